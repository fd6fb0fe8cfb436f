"""One run at a time in a workdir."""

import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from mae_dist import storage
from mae_dist.errors import StorageFault
from mae_dist.resilience import lock
from tests.gcs_emulator import GcsEmulator

HOLD = """
import sys
from etils import epath
from mae_dist.resilience import lock
with lock.workdir_lock(epath.Path(sys.argv[1])):
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
    with pytest.raises(StorageFault, match=f'"process": {holder.pid}'), lock.workdir_lock(workdir):
        pass
    holder.kill()
    holder.communicate()
    with lock.workdir_lock(workdir):
        pass
    with lock.workdir_lock(workdir):
        pass


def test_unwritable_workdir_is_a_fault(tmp_path):
    """A file where the directory should be."""
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageFault, match="run"), lock.workdir_lock(epath.Path(tmp_path / "run")):
        pass


@pytest.fixture
def bucket(monkeypatch):
    """An emulated Cloud Storage."""
    import fsspec

    with GcsEmulator(["bucket"]) as emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "test")
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        fsspec.get_filesystem_class("gcs").clear_instance_cache()  # one made for another emulator
        storage.absolute("gs://bucket")
        yield emulator.buckets["bucket"]


LEASE = epath.Path("gs://bucket/run/.lock")


def test_lease(bucket):
    """One that is renewed keeps others out; one left behind is taken over; an orderly end leaves none."""
    with lock._lease(LEASE, renew_secs=0.05, watch_secs=5.0) as held:
        with pytest.raises(StorageFault, match="in use by another run"), lock._lease(LEASE, 0.05, watch_secs=5.0):
            pass
        assert [thread.name for thread in threading.enumerate()].count("lease") == 1
        held.check()
    assert not bucket
    LEASE.write_text('{"process": 1}')  # of one that was killed
    with lock._lease(LEASE, renew_secs=0.05, watch_secs=0.3):
        assert '"process": 1}' not in LEASE.read_text()
    assert not bucket


def test_of_many_that_begin_together_one_gets_the_lease(bucket):
    """Each looks before any writes; with a lease left behind, too, whom nobody but one may delete."""
    for left_behind in (False, True):
        if left_behind:
            LEASE.write_text('{"process": 1}')
        count, outcomes, gate, over = 6, [], threading.Barrier(6), threading.Event()

        def enter(outcomes=outcomes, gate=gate, over=over):
            gate.wait()
            try:
                with lock._lease(LEASE, renew_secs=0.1, watch_secs=1.0):
                    outcomes.append("held")
                    over.wait()
            except StorageFault:
                outcomes.append("refused")

        threads = [threading.Thread(target=enter) for _ in range(count)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while len(outcomes) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        over.set()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["held", *["refused"] * (count - 1)]
        assert not bucket


def test_a_holder_whose_lease_was_taken_stops(bucket):
    """It was silent for too long; what the other wrote stays, when this one ends as well."""
    with lock._lease(LEASE, renew_secs=0.05, watch_secs=1.0) as held:
        deadline = time.monotonic() + 10
        while not held.taken_by and time.monotonic() < deadline:
            LEASE.write_text('{"process": 2}')  # again and again, as a holder does
            time.sleep(0.03)
        with pytest.raises(StorageFault, match=r'took its workdir over: \{"process": 2\}'):
            held.check()
    assert LEASE.read_text() == '{"process": 2}'
