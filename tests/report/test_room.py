import errno
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from globenc_lightning.report.room import RESERVE, require_room


def test_room_is_asked_for_where_a_logger_writes(tmp_path: Path) -> None:
    for place in (tmp_path, str(tmp_path)):
        require_room(SimpleNamespace(log_dir=place), 1000)
        with pytest.raises(OSError, match="16 MB, left to other logs") as caught:
            require_room(SimpleNamespace(log_dir=place), 10**18)
        assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("place", [None, 3, "s3://bucket/run", "/no/such/folder"])
def test_nothing_is_asked_where_there_is_no_local_folder(place: object) -> None:
    require_room(SimpleNamespace(log_dir=place), 10**18)
    require_room(object(), 10**18)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such limit")
def test_a_file_must_not_reach_the_length_that_is_allowed(tmp_path: Path) -> None:
    import resource

    logger = SimpleNamespace(log_dir=tmp_path)
    (tmp_path / "events").write_bytes(bytes(5000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (RESERVE + 6000, hard))
    try:
        require_room(logger, 1000)
        with pytest.raises(OSError, match="16 MB, left to other logs") as caught:
            require_room(logger, 1001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
