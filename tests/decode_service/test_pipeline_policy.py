"""The pipeline's policy on a GPU that is arithmetic: what it settles on, what it costs, and what it does not do."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from decode_service.pipeline.arrangements import Arrangement, Cell, cell_of
from decode_service.pipeline.calibration import Calibration
from decode_service.pipeline.cell_policy import LOSING
from decode_service.pipeline.decisions import Change, Purpose, Reason
from decode_service.pipeline.order import Cut
from decode_service.pipeline.policy import PipelinePolicy
from decode_service.pipeline.windows import WINDOW
from tests.support.partition_model import ARRANGEMENTS, PartitionModel

BALANCED, ATTENTION_HEAVY, FFN_HEAVY = Cell(1024, 512), Cell(1024, 1024), Cell(1024, 256)
CORE_48, LAYER_16 = Arrangement(Cut.ATTENTION_CORE, 48, 84), Arrangement(Cut.LAYER, 16, 116)
# Lanes slow each other so much that no arrangement pays.
HOPELESS = 1.3


@dataclass
class Outcome:
    """Of driving a policy through steps."""

    changes: list[tuple[int, Change]] = field(default_factory=list)
    purposes: list[Purpose] = field(default_factory=list)
    seconds: float = 0.0
    sequential_s: float = 0.0

    @property
    def speed(self) -> float:
        """Against sequential steps, probes and samples included."""
        return self.sequential_s / self.seconds

    @property
    def reasons(self) -> list[Reason]:
        return [change.reason for _, change in self.changes]


def make_policy(model: PartitionModel, *cells: Cell, tried=(), **settings) -> PipelinePolicy:
    calibration = Calibration(tuple(model.calibrate(cell, tried=tried) for cell in cells))
    return PipelinePolicy(
        ARRANGEMENTS, calibration, num_layers=model.num_layers, batch_buckets=(1, 64, 256, 1024), **settings
    )


def drive(policy, model, cell, num_steps, *, turn: Callable[[int], None] = lambda step: None) -> Outcome:
    """`turn` changes the model before each step."""
    outcome = Outcome()
    for step in range(num_steps):
        turn(step)
        run = policy.next_run(*cell)
        seconds, busy_s = model.run(run.arrangement, cell)
        change = policy.observe(run, seconds, busy_s if run.purpose is Purpose.SAMPLE else None)
        if change is not None:
            outcome.changes.append((step, change))
        outcome.purposes.append(run.purpose)
        outcome.seconds += seconds
        outcome.sequential_s += model.step_s(None, cell)
    return outcome


def behind_the_best(policy, model, cell) -> float:
    """How much longer steps take than in the best way there is; 0 is none."""
    return model.step_s(policy.choice(cell), cell) / model.step_s(model.best(cell), cell) - 1


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("cell", [BALANCED, ATTENTION_HEAVY, FFN_HEAVY])
def test_it_settles_on_nearly_the_best_arrangement_and_stays(cell, noise):
    model = PartitionModel(noise=noise, hiccups=noise / 4)
    policy = make_policy(model, cell)
    outcome = drive(policy, model, cell, 20_000)
    assert policy.choice(cell) is not None
    assert policy.reason(cell) is None
    assert behind_the_best(policy, model, cell) < 0.02
    assert outcome.speed > (1.03 if noise < 0.05 else 1.0)
    assert len(outcome.changes) <= 5
    assert not [change for step, change in outcome.changes if step > 15_000 and noise < 0.05]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cell", [BALANCED, ATTENTION_HEAVY, FFN_HEAVY, Cell(64, 1024)])
def test_where_the_pipeline_never_pays_steps_are_sequential_and_looking_costs_no_percent(cell, seed):
    model = PartitionModel(noise=0.03, contention=HOPELESS, seed=seed)
    policy = make_policy(model, cell)
    outcome = drive(policy, model, cell, 20_000)
    assert policy.choice(cell) is None
    assert policy.reason(cell) in (Reason.SEQUENTIAL_IS_FASTER, Reason.LOSS_AGAINST_SEQUENTIAL, Reason.NO_GAIN)
    # The noise itself is as much.
    assert outcome.speed > 0.99
    assert len(outcome.changes) <= 4


@pytest.mark.parametrize("seed", range(4))
def test_where_it_hardly_pays_choices_do_not_oscillate(seed):
    model = PartitionModel(noise=0.02, contention=1.145, seed=seed)
    assert model.step_s(model.best(BALANCED), BALANCED) / model.step_s(None, BALANCED) == pytest.approx(0.99, abs=0.003)
    policy = make_policy(model, BALANCED)
    outcome = drive(policy, model, BALANCED, 40_000)
    assert len(outcome.changes) <= 12
    assert outcome.speed > 0.99


def test_what_calibration_found_best_runs_from_the_first_step():
    model = PartitionModel()
    policy = make_policy(model, BALANCED, tried=ARRANGEMENTS.all)
    assert policy.choice(BALANCED) == CORE_48
    assert not drive(policy, model, BALANCED, 5_000).changes


def test_a_calibration_that_does_not_come_true_ends_sequential_with_a_reason():
    model = PartitionModel()
    policy = make_policy(model, BALANCED, tried=ARRANGEMENTS.all)
    model.contention = HOPELESS
    outcome = drive(policy, model, BALANCED, 10_000)
    assert outcome.reasons[0] is Reason.LOSS_AGAINST_SEQUENTIAL
    assert policy.reason(BALANCED) is Reason.LOSS_AGAINST_SEQUENTIAL
    assert sum(change.is_switch for _, change in outcome.changes) == 1
    assert outcome.speed > 0.99


def test_a_loss_that_comes_later_ends_in_sequential_and_a_gain_that_comes_back_is_found():
    model = PartitionModel(noise=0.01)
    policy = make_policy(model, BALANCED)
    drive(policy, model, BALANCED, 5_000)
    assert policy.choice(BALANCED) == CORE_48
    model.contention = HOPELESS
    outcome = drive(policy, model, BALANCED, 10_000)
    assert outcome.reasons[-1] is Reason.LOSS_AGAINST_SEQUENTIAL
    assert policy.choice(BALANCED) is None
    assert outcome.speed > 0.97
    model.contention = 1.04
    drive(policy, model, BALANCED, 25_000)
    assert policy.choice(BALANCED) == CORE_48


def test_attempts_after_a_loss_come_ever_more_rarely():
    model = PartitionModel(contention=HOPELESS)
    policy = make_policy(model, BALANCED)
    purposes = drive(policy, model, BALANCED, 20_000).purposes
    probed = [step // WINDOW for step, purpose in enumerate(purposes) if purpose is Purpose.PROBE]
    pauses = [later - earlier for earlier, later in itertools.pairwise(probed) if later - earlier > 4]
    assert pauses[:4] == sorted(pauses[:4])
    assert pauses[3] > 5 * pauses[0]
    assert max(pauses) < 80


def test_pairs_follow_a_load_that_drifts_one_at_a_time():
    model = PartitionModel(noise=0.01)
    policy = make_policy(model, BALANCED)
    drive(policy, model, BALANCED, 2_000)

    def grow(step):
        model.attention_drift = round(1 + 1.2 * min(step / 8_000, 1), 2)

    outcome = drive(policy, model, BALANCED, 20_000, turn=grow)
    moved = [(change.before.attention_sm, change.after.attention_sm) for _, change in outcome.changes]
    assert moved == [(48, 64), (64, 80)]
    assert all(change.is_rebalance for _, change in outcome.changes)
    assert behind_the_best(policy, model, BALANCED) < 0.02


def test_a_clock_that_slows_everything_changes_nothing():
    model = PartitionModel(noise=0.01)
    policy = make_policy(model, BALANCED)

    def throttle(step):
        model.clock_drift = 1.25 if step // 3_000 % 2 else 1.0

    assert len(drive(policy, model, BALANCED, 30_000, turn=throttle).changes) == 1


def test_a_change_that_does_not_bring_what_was_predicted_is_taken_back():
    better = Arrangement(Cut.ATTENTION_CORE, 64, 68)
    model = PartitionModel(noise=0.01, attention_drift=1.2, surprises={better: 1.2})
    policy = make_policy(model, BALANCED, tried=(CORE_48,))
    outcome = drive(policy, model, BALANCED, 10_000)
    assert [change.after for _, change in outcome.changes][:2] == [better, CORE_48]
    assert outcome.reasons[:2] == [Reason.PREDICTED_GAIN, Reason.NO_GAIN]
    assert [change.after for _, change in outcome.changes].count(better) <= 3
    assert outcome.speed > 1


def test_a_static_split_runs_whatever_it_costs_and_its_loss_is_known():
    model = PartitionModel()
    policy = make_policy(model, BALANCED, asked=LAYER_16)
    outcome = drive(policy, model, BALANCED, 3_000)
    assert not outcome.changes
    assert policy.choice(BALANCED) == LAYER_16
    share = model.step_s(LAYER_16, BALANCED) / model.step_s(None, BALANCED)
    assert policy.gain(BALANCED) == pytest.approx(1 / share, rel=0.01)
    assert outcome.purposes.count(Purpose.PROBE) <= 3_000 / (8 * WINDOW) + 1


def test_probes_are_one_step_in_a_window_at_most():
    model = PartitionModel(noise=0.02)
    purposes = drive(make_policy(model, BALANCED), model, BALANCED, 20_000).purposes
    assert purposes.count(Purpose.PROBE) <= 20_000 / WINDOW
    assert purposes.count(Purpose.SAMPLE) <= 20_000 / (8 * WINDOW) + 2


def test_a_cell_without_data_starts_from_its_neighbour_and_measures_before_it_changes():
    model = PartitionModel()
    policy = make_policy(model, BALANCED)
    drive(policy, model, BALANCED, 2_000)
    assert policy.reason(ATTENTION_HEAVY) is Reason.MEASURING
    drive(policy, model, ATTENTION_HEAVY, 10_000)
    assert behind_the_best(policy, model, ATTENTION_HEAVY) < 0.03


def test_without_any_data_steps_are_sequential_and_say_why():
    model = PartitionModel()
    policy = make_policy(model)
    outcome = drive(policy, model, BALANCED, 500)
    assert set(outcome.purposes) == {Purpose.CHOICE}
    assert policy.reason(BALANCED) is Reason.NOT_CALIBRATED


def test_a_single_sequence_is_not_cut_in_two():
    model = PartitionModel()
    policy = make_policy(model, BALANCED, asked=CORE_48)
    assert policy.next_run(1, 300).arrangement is None
    assert policy.reason(Cell(1, 512)) is Reason.SINGLE_SEQUENCE


def test_the_same_observations_lead_to_the_same_decisions():
    def changes():
        model = PartitionModel(noise=0.05, seed=3)
        return drive(make_policy(model, ATTENTION_HEAVY), model, ATTENTION_HEAVY, 8_000).changes

    assert changes() == changes()


def test_a_step_that_began_before_a_change_does_not_count_as_the_new_choice():
    model = PartitionModel()
    policy = make_policy(model, BALANCED, tried=(CORE_48,))
    stale = policy.next_run(*BALANCED)
    stale = stale._replace(arrangement=LAYER_16, purpose=Purpose.CHOICE)
    for _ in range(LOSING * WINDOW):
        assert policy.observe(stale, 1.0) is None


@pytest.mark.parametrize(
    ("num_seqs", "mean_context", "cell"),
    [(1, 0, (1, 256)), (3, 256, (64, 256)), (64, 257, (64, 512)), (65, 4000.5, (256, 4096)), (5000, 600, (1024, 1024))],
)
def test_cells_are_batch_buckets_and_doublings_of_context(num_seqs, mean_context, cell):
    assert cell_of(num_seqs, mean_context, (1, 64, 256, 1024)) == cell
