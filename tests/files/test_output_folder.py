import subprocess
import sys

import pytest

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.files.output_folder import RunFolder, set_aside


# Takes the lock as the operating system has it, or says that it is taken.
LOCK = """
import fcntl, sys
file = open(sys.argv[1], "a")
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("taken")
print("locked", flush=True)
sys.stdin.read()
"""


def lock(folder):
    command = [sys.executable, "-c", LOCK, str(folder / ".lock")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_one_run_at_a_time_and_nothing_is_left_of_it(tmp_path):
    folder = tmp_path / "new" / "run"
    for _ in range(2):
        with RunFolder(folder, "training"):
            assert names(folder) == [".lock"]
            with pytest.raises(UserError, match="another run is writing to .*run: wait for it") as error:
                with RunFolder(folder, "evaluation"):
                    pass
            assert "\n" not in str(error.value) and names(folder) == [".lock"]
        assert names(folder) == []
    with pytest.raises(ZeroDivisionError), RunFolder(folder, "training"):
        1 / 0
    assert names(folder) == []


def test_another_process_is_kept_out_until_the_first_is_killed(tmp_path):
    holder = lock(tmp_path)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="another run is writing"), RunFolder(tmp_path, "training"):
        pass
    holder.kill()
    holder.communicate()
    with RunFolder(tmp_path, "training"):
        other = lock(tmp_path)
        assert other.communicate(timeout=60)[1] == "taken\n" and other.returncode == 1


def test_who_wrote_to_a_folder(tmp_path):
    folder = RunFolder(tmp_path, "training")
    with folder:
        assert not folder.has_begun()
        folder.begin()
    assert folder.has_begun() and names(tmp_path) == [".run"]
    assert not RunFolder(tmp_path, "evaluation").has_begun()


@pytest.mark.parametrize("make", ["mkdir", "touch"])
def test_what_is_set_aside_takes_no_name_that_is_taken(tmp_path, make):
    (tmp_path / "a.set_aside-2").symlink_to(tmp_path / "nowhere")
    for _ in range(3):
        getattr(tmp_path / "a", make)()
        set_aside(tmp_path / "a")
    assert names(tmp_path) == ["a.set_aside", "a.set_aside-2", "a.set_aside-3", "a.set_aside-4"]
