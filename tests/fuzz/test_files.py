"""Every command, with input files that are damaged in any way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .commands import CALLS, FUZZ, check, copied, list_inputs
from .damage import any_damage


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.inputs])
@FUZZ
@given(data=st.data())
def test_damaged_inputs(world, name, data):
    call = CALLS[name]
    with copied(world) as folder:
        for file in data.draw(
            st.lists(st.sampled_from(list_inputs(call, folder)), min_size=1, max_size=2, unique=True)
        ):
            data.draw(any_damage(file))(file)
        check(call, call.arguments, folder)


@pytest.mark.parametrize("name", CALLS)
def test_the_small_setting_is_accepted(world, name):
    with copied(world) as folder:
        result = check(CALLS[name], CALLS[name].arguments, folder)
        assert result.exit_code == 0, result.output
