"""One run at a time in a workdir."""

import subprocess
import sys
import threading

import pytest
from etils import epath

from mae_dist import lock
from mae_dist.errors import StorageFault

HOLD = """
import sys
from etils import epath
from mae_dist import lock
with lock.sole_user(epath.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_is_refused_until_the_first_is_gone(workdir):
    """By another process, killed without a chance to clean up."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StorageFault, match=f'"process": {holder.pid}'), lock.sole_user(workdir):
        pass
    holder.kill()
    holder.communicate()
    with lock.sole_user(workdir):
        pass
    with lock.sole_user(workdir):
        pass


def test_unwritable_workdir_is_a_fault(tmp_path):
    """A file where the directory should be."""
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageFault, match="run"), lock.sole_user(epath.Path(tmp_path / "run")):
        pass


def test_lease(tmp_path):
    """One that is renewed keeps others out; one left behind is taken over; an orderly end leaves none."""
    path = epath.Path(tmp_path / ".lock")
    with lock._lease(path, renew_secs=0.05, watch_secs=2.0):
        before = threading.active_count()
        with pytest.raises(StorageFault, match="in use by another run"), lock._lease(path, 0.05, watch_secs=2.0):
            pass
        assert threading.active_count() == before
    assert not path.exists()
    path.write_text('{"process": 1}')  # of one that was killed
    with lock._lease(path, renew_secs=0.05, watch_secs=0.3):
        assert path.exists()
    assert not path.exists()
