from __future__ import annotations

import re

import grpc

from common import errors


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__)
    assert drawn == [leaf.__name__ for leaf in errors.PdserveError.__subclasses__()]


def test_every_leaf_has_a_status_of_its_own_and_none_is_unknown():
    leaves = errors.PdserveError.__subclasses__()
    codes = {leaf.code for leaf in leaves}
    assert len(codes) == len(leaves)
    assert not codes & {grpc.StatusCode.UNKNOWN, grpc.StatusCode.OK, grpc.StatusCode.UNIMPLEMENTED}


def test_what_is_not_a_domain_error_is_internal():
    status = errors.to_status(KeyError("x"))
    assert status.code is grpc.StatusCode.INTERNAL
    assert status.details == "KeyError: 'x'"


def test_exhaustion_always_says_when_to_come_back():
    assert errors.ResourceExhausted("full").retry_after_s == 1.0


def test_a_short_message_is_not_clipped():
    text = "ü" * 512
    assert errors.to_status(errors.NotFound(text)).details == text
