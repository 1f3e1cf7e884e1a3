"""What is predicted of an arrangement, and what measurements change about it."""

import pytest

from decode_service.pipeline.arrangements import Arrangement, Cell
from decode_service.pipeline.average import MOST, Average
from decode_service.pipeline.calibration import StageTime
from decode_service.pipeline.order import Cut, Lane
from decode_service.pipeline.predictions import Predictions
from decode_service.pipeline.stage_times import StageTimes
from tests.support.partition_model import ARRANGEMENTS, PartitionModel

CELL = Cell(1024, 512)
PAIR, NEXT = Arrangement(Cut.ATTENTION_CORE, 48, 84), Arrangement(Cut.ATTENTION_CORE, 64, 68)


def predictions_of(model: PartitionModel, *, tried=()) -> Predictions:
    return Predictions(ARRANGEMENTS, model.num_layers, model.calibrate(CELL, tried=tried))


def share(model: PartitionModel, arrangement: Arrangement) -> float:
    return model.step_s(arrangement, CELL) / model.step_s(None, CELL)


@pytest.mark.parametrize("cut", Cut)
@pytest.mark.parametrize("pair", [(48, 84), (16, 116)])
def test_where_stages_were_measured_and_nothing_interferes_the_prediction_is_exact(cut, pair):
    model = PartitionModel(contention=1.0)
    arrangement = Arrangement(cut, *pair)
    assert predictions_of(model).share(arrangement) == pytest.approx(share(model, arrangement))


def test_a_measured_step_corrects_its_neighbours_too():
    model = PartitionModel(contention=1.2)
    before, after = predictions_of(model), predictions_of(model, tried=(PAIR,))
    assert after.share(PAIR) == pytest.approx(share(model, PAIR))
    assert after.share(NEXT) == pytest.approx(1.2 * before.share(NEXT), rel=0.01)


def test_first_samples_change_no_prediction_of_what_was_measured_and_later_ones_do():
    model = PartitionModel(contention=1.2)
    predictions = predictions_of(model, tried=(PAIR,))
    before = predictions.share(PAIR)
    for _ in range(3):
        predictions.add_stages(PAIR, model.run(PAIR, CELL)[1])
    assert predictions.share(PAIR) == pytest.approx(before)
    model.attention_drift = 2.0
    for _ in range(20):
        predictions.add_stages(PAIR, model.run(PAIR, CELL)[1])
    assert predictions.share(PAIR) > 1.2 * before


def test_lanes_that_share_all_sms_promise_no_overlap():
    model = PartitionModel()
    assert predictions_of(model).share(Arrangement(Cut.LAYER, 132, 132)) >= 1


def test_a_lane_is_busy_for_the_stages_of_both_micro_batches_its_first_and_last_among_them():
    attention = StageTime(Cut.LAYER, Lane.ATTENTION, 64, 2.0, first_s=3.0)
    stages = StageTimes(Cut.LAYER, 3, [attention, StageTime(Cut.LAYER, Lane.FFN, 68, 1.0, last_s=5.0)])
    assert stages.busy(64, 68) == {Lane.ATTENTION: 2 * (3 + 2 + 2), Lane.FFN: 2 * (1 + 1 + 5)}


def test_without_stage_times_only_measured_steps_are_predicted():
    predictions = Predictions(ARRANGEMENTS, 16, None)
    assert predictions.share(PAIR) is None
    predictions.add_step(PAIR, 0.9)
    assert predictions.share(PAIR) == 0.9
    assert predictions.share(Arrangement(Cut.LAYER, 48, 84)) is None


@pytest.mark.parametrize(("num_sm", "seconds"), [(16, 4.0), (32, 2.0), (48, 1.5), (96, 1.0), (132, 1.0)])
def test_stage_times_between_and_beyond_what_was_measured(num_sm, seconds):
    times = [StageTime(Cut.LAYER, Lane.ATTENTION, 32, 2.0), StageTime(Cut.LAYER, Lane.ATTENTION, 96, 1.0)]
    stages = StageTimes(Cut.LAYER, 1, [*times, StageTime(Cut.LAYER, Lane.FFN, 132, 0.0)])
    assert stages.makespan(num_sm, 132, overlaps=True) == pytest.approx(2 * seconds)


def test_an_average_replaces_a_guess_means_what_is_few_and_caps_what_is_far():
    average = Average(5.0, num_values=0)
    average.add(1.0)
    assert average.value == 1.0
    average.add(0.5)
    assert average.value == 0.75
    average.add(100.0)
    assert average.value <= 0.75 * MOST
