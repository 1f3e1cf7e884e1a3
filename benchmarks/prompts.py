"""Prompts of the benchmarks: pieces of one text, none a prefix of another."""

from __future__ import annotations

TEXT = (
    "The for statement is used to iterate over the elements of a sequence (such as a string, tuple or list) or other "
    "iterable object. The expression list is evaluated once; it should yield an iterable object. An iterator is "
    "created for that iterable. The first item provided by the iterator is then assigned to the target list using the "
    "standard rules for assignments, and the suite is executed."
)


def prompts(count: int, *, num_characters: int = 160) -> list[str]:
    """`count` different prompts of about `num_characters`."""
    return [(TEXT[index * 7 % 200 :] + TEXT)[:num_characters] + f" {index}" for index in range(count)]
