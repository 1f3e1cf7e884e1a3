"""The fault matrix leaves nothing out but what a machine cannot do."""

from benchmarks.fault_cells import PHASES, Cell, cells
from tests.support.control_link import Fault


def test_every_fault_strikes_every_role_in_every_phase():
    every = [cell for cell in cells(has_network=True) if cell.role != "pair"]
    struck = {(cell.fault, cell.role) for cell in every}
    faults = ("kill", "restart", "stop", "cut", "reset")
    assert struck == {(fault, role) for fault in faults for role in ("prefill", "decode", "router")} | {
        ("leave", "client"),
        ("slow", "client"),
    }
    assert len(every) == len(struck) * len(PHASES) == len(set(every))


def test_every_fault_of_a_message_strikes_a_prompt_under_way():
    of_messages = [cell for cell in cells(has_network=False) if cell.role == "pair"]
    assert of_messages == [Cell(fault.value, "prefilling", "pair") for fault in Fault]


def test_without_a_network_of_its_own_only_faults_of_the_network_are_missing():
    missing = set(cells(has_network=True)) - set(cells(has_network=False))
    assert {cell.fault for cell in missing} == {"cut", "reset"}
