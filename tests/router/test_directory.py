"""Where workers may be."""

import pytest

from common.address import Address
from router.directory import Directory, look_up
from tests.fakes.names import FakeNames


@pytest.fixture
def names():
    return FakeNames()


async def test_addresses_stand_as_they_are_and_nobody_is_asked(names):
    directory = Directory(["10.0.0.2:53", "[::1]:53", "10.0.0.1:53"], names)
    await directory.refresh()
    assert directory.addresses == ["10.0.0.2:53", "[::1]:53", "10.0.0.1:53"]
    assert names.num_asked == 0


async def test_a_name_leads_to_as_many_as_it_does_each_once(names):
    names.answers["decode:53"] = ["10.0.0.1:53", "10.0.0.2:53"]
    directory = Directory(["10.0.0.2:53", "decode:53"], names)
    assert (directory.addresses, directory.unknown_names) == (["10.0.0.2:53"], ["decode:53"])
    await directory.refresh()
    assert (directory.addresses, directory.unknown_names) == (["10.0.0.2:53", "10.0.0.1:53"], [])
    names.answers["decode:53"] = []
    await directory.refresh()
    assert (directory.addresses, directory.unknown_names) == (["10.0.0.2:53"], ["decode:53"])


async def test_a_failure_changes_nothing_and_is_told_once(names, caplog):
    names.answers["decode:53"] = ["10.0.0.1:53"]
    directory = Directory(["decode:53"], names)
    await directory.refresh()
    names.is_failing = True
    for _ in range(3):
        await directory.refresh()
    assert directory.addresses == ["10.0.0.1:53"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_this_machine_knows_its_own_name():
    assert await look_up(Address("localhost", 53)) == [Address("127.0.0.1", 53)]
