from benchmarks.overload import MEASURE_S, OUTPUT_TOKENS, WARM_S, Asked, Point


def _asked(due_s: float, *, takes_s: float = 1.0, failure: str = "", has_begun: bool = True) -> Asked:
    return Asked(due_s, due_s + 0.5 if has_begun else None, due_s + takes_s, failure)


def test_goodput_is_what_ended_well_while_it_was_measured():
    point = Point()
    point.add(
        [
            _asked(WARM_S - 2.0),
            # It was sent before, and ended within.
            _asked(WARM_S - 0.5),
            _asked(WARM_S + 1.0),
            _asked(WARM_S + 1.0, failure="DEADLINE_EXCEEDED"),
            _asked(WARM_S + MEASURE_S - 0.5),
        ],
        begun_s=0.0,
    )
    assert point.goodputs == [2 * OUTPUT_TOKENS / MEASURE_S]


def test_a_row_says_what_became_of_those_that_were_sent_and_how_long_the_admitted_took():
    point = Point()
    point.add(
        [
            _asked(100.0),
            _asked(100.0, takes_s=3.0),
            _asked(100.0, takes_s=4.0, failure="DEADLINE_EXCEEDED"),
            _asked(100.0, takes_s=0.0, failure="PREDICTED_TOO_LATE", has_begun=False),
            _asked(100.0, takes_s=0.0, failure="NO_WORKER", has_begun=False),
        ],
        begun_s=0.0,
    )
    row = point.row()
    assert (row["ended in time"], row["turned away"], row["begun and cut off"]) == ("40.0%", "20.0%", "20.0%")
    assert (row["failed otherwise"], row["first token p50, ms"]) == ("1 NO_WORKER", 500)
