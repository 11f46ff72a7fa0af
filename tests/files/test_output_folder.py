import subprocess
import sys

import pytest

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.files.output_folder import RunFolder, set_aside


# Enters the folder it is given, says so, and waits.
HOLD = """
import sys, time
from astrolabe_diffusers.files.output_folder import RunFolder
with RunFolder(sys.argv[1], "training"):
    print("locked", flush=True)
    time.sleep(600)
"""


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


def test_another_process_is_kept_out_until_it_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another run is writing"), RunFolder(tmp_path, "training"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with RunFolder(tmp_path, "training"):
        pass


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
