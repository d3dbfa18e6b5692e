"""The page of abilities says what tests say."""

import abilities
import pytest


@pytest.mark.parametrize(("framework", "test"), sorted(set(abilities.tests())))
def test_every_yes_is_a_test(framework, test):
    assert abilities.exists(framework, test)


def test_no_other_name_is_one():
    assert not abilities.exists("jax", "test_step.py::test_that_nobody_has_written")


def test_the_page_is_made_from_them():
    """Anew: `python tests/abilities.py --write`."""
    assert abilities.PAGE.read_text() == abilities.page()
