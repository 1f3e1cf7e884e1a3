"""The guess at a worker's prefix cache."""

from router.prefixes import PrefixIndex


def test_the_longest_known_prefix_matches():
    index = PrefixIndex(10)
    index.add([b"1", b"2", b"3"])
    assert index.num_matching([b"1", b"2", b"x", b"3"]) == 2
    assert index.num_matching([b"x"]) == 0
    assert index.num_matching([]) == 0


def test_it_is_bounded_and_forgets_what_was_sent_longest_ago():
    index = PrefixIndex(3)
    index.add([b"old"])
    index.add([b"1", b"2"])
    index.add([b"new"])
    assert len(index) == 3
    assert (index.num_matching([b"old"]), index.num_matching([b"new"])) == (0, 1)


def test_the_beginning_of_a_prefix_is_kept_longest():
    index = PrefixIndex(2)
    index.add([b"1", b"2", b"3"])
    assert index.num_matching([b"1", b"2", b"3"]) == 2
