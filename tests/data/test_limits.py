import signal
import sys
import threading

import pytest

from dualsft.data.limits import limited
from dualsft.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="both limits are there on Linux")


def spin() -> None:
    """Never ends, and catches every exception as template engines do."""
    while True:
        try:
            sum(range(1000))
        except Exception:
            continue


def test_time() -> None:
    """What does not end is stopped, even if it catches exceptions, and the timer is as it was."""
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(UserError, match=r"^it has not come to an end after 0\.05 s"), limited("it", seconds=0.05):
        spin()
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_memory() -> None:
    """What grows too large is refused, and the limit is as it was."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match=r"^it takes more than 1 GiB"), limited("it"):
        bytearray(2**31)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with limited("it"):
        bytearray(2**20)


def test_other_threads() -> None:
    """Where no timer can be set, what ends still runs."""
    done = []

    def work() -> None:
        with limited("it"):
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]
