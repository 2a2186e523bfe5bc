"""Events reach the callbacks that override them, and the example in docs/howto/add_a_callback.md works."""

import pytest
from guides import code_of, run

from megatron_qad.engine.events import Callback, Events, Update


def test_events_reach_subscribers_in_order():
    received = []

    class First(Callback):
        def step_begins(self, step, model):
            received.append(("first", step))

    class Second(Callback):
        def step_begins(self, step, model):
            received.append(("second", step))

        def job_ends(self, is_done):
            received.append(("second", is_done))

    events = Events([First(), Second()])
    events.step_begins(3, [])
    events.gradients_begin()  # no callback overrides it
    events.job_ends(is_done=True)
    assert received == [("first", 3), ("second", 3), ("second", True)]


def test_callback_error_is_raised():
    class Fails(Callback):
        def gradients_ready(self):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Events([Fails()]).gradients_ready()


def test_unknown_event_is_an_error():
    with pytest.raises(AttributeError, match="there is no event 'step_started'"):
        Events().step_started(1)


def test_callback_in_howto_page():
    code = code_of("add_a_callback.md")["megatron_qad/training/callbacks/few_tokens.py"]
    callback = run(code, "few_tokens")["FewTokens"](least=100)
    events = Events([callback])
    updates = [Update(step, [], loss=1.0, num_tokens=n, is_finite=True) for step, n in ((1, 100), (2, 99), (3, 500))]
    for update in updates:
        events.before_update(update)
    assert [update.is_left_out for update in updates] == [False, True, False] and callback.steps_left_out == [2]
