"""Signals are noted, and end the process only if they come again; children are as if nobody listened."""

import os
import signal
import time

import pytest

from nnunet_lomix.trainers.signals import SIGNALS, StopSignals


def status_of(child) -> int:
    """How a forked process that does this has ended: 0, or the signal that killed it."""
    process = os.fork()
    if process == 0:
        child()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_its_echo_does_nothing(number):
    before = [signal.getsignal(n) for n in (*SIGNALS, signal.SIGINT)]
    with StopSignals() as signals:
        assert signals.received is None
        send(number)
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert signals.received == number
    assert [signal.getsignal(n) for n in (*SIGNALS, signal.SIGINT)] == before


def test_ctrl_c_is_as_ever_until_a_signal_comes():
    with pytest.raises(KeyboardInterrupt), StopSignals():
        send(signal.SIGINT)


def test_another_signal_a_second_later_ends_the_process_at_once():
    def child():
        with StopSignals():
            send(signal.SIGUSR1)
            time.sleep(1.1)
            send(signal.SIGTERM)

    assert status_of(child) == -signal.SIGTERM


def test_a_worker_that_was_forked_meanwhile_ends_as_if_we_were_not_there():
    with StopSignals() as signals:
        assert status_of(lambda: send(signal.SIGTERM)) == -signal.SIGTERM
    assert signals.received is None
