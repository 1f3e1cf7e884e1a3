"""The fault matrix leaves nothing out but what a machine cannot do."""

from benchmarks.fault_cells import PHASES, cells


def test_every_fault_strikes_every_role_in_every_phase():
    struck = {(cell.fault, cell.role) for cell in cells(has_network=True)}
    faults = ("kill", "restart", "stop", "cut", "reset")
    assert struck == {(fault, role) for fault in faults for role in ("prefill", "decode", "router")} | {
        ("leave", "client"),
        ("slow", "client"),
    }
    assert len(cells(has_network=True)) == len(struck) * len(PHASES) == len(set(cells(has_network=True)))


def test_without_a_network_of_its_own_only_faults_of_the_network_are_missing():
    missing = set(cells(has_network=True)) - set(cells(has_network=False))
    assert {cell.fault for cell in missing} == {"cut", "reset"}
