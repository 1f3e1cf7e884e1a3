"""Who was given what: the rules of the counters."""

from router.fair_share import MAX_CLIENTS, OUTPUT_WEIGHT, FairShare


def test_prompts_and_output_are_charged():
    share = FairShare()
    share.enter("a")
    share.take("a", num_prompt_tokens=10)
    share.put_out("a", num_tokens=3)
    assert share.given("a") == 10 + 3 * OUTPUT_WEIGHT


def test_who_comes_is_set_level_with_those_that_are_served():
    share = FairShare()
    for _ in range(3):
        share.enter("old")
        share.take("old", num_prompt_tokens=100)
    share.enter("new")
    assert share.given("new") == 200, "what the last one taken had been given before"


def test_who_comes_back_has_saved_nothing_up():
    share = FairShare()
    for client in ("a", "b"):
        share.enter(client)
    for _ in range(5):
        share.take("a", num_prompt_tokens=100)
    share.enter("b")
    assert share.given("b") == 400


def test_a_debt_is_not_forgotten_by_leaving():
    share = FairShare()
    share.enter("a")
    share.put_out("a", num_tokens=500)
    share.enter("a")
    assert share.given("a") == 500 * OUTPUT_WEIGHT


def test_of_very_many_clients_the_last_ones_are_remembered():
    share = FairShare()
    for number in range(MAX_CLIENTS + 10):
        share.enter(f"{number}")
        share.take(f"{number}", num_prompt_tokens=7)
    assert len(share) == MAX_CLIENTS
    assert (share.given("9"), share.given("10")) == (0, 7)
