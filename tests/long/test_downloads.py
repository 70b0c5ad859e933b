"""Downloads from Kaggle, its package faked: put in place, or said what to do."""

import errno
import sys
import types

import pytest
from test_prepare import LAYOUT, contents, files

from commands import prepare
from utils import RunError, UserError


def kaggle(monkeypatch, answer) -> None:
    """Install a kagglehub that returns a path or raises."""

    def dataset_download(handle):
        assert handle == "puneet6060/intel-image-classification"
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=dataset_download))


def kaggle_error(name: str, status: int | None = None, *bases: type) -> Exception:
    error = type(name, bases or (Exception,), {})("server said no")
    error.response = types.SimpleNamespace(status_code=status)
    return error


def test_download_is_put_in_place(tmp_path, monkeypatch):
    for name, content in files().items():
        (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / name).write_bytes(content)
    (tmp_path / "cache" / "link.jpg").symlink_to("/etc/hostname")
    kaggle(monkeypatch, tmp_path / "cache")
    prepare.download_from_kaggle(tmp_path / "one")
    assert contents(tmp_path / "one") == files()
    assert (tmp_path / "cache" / LAYOUT[0]).exists(), "kagglehub's cache stays as it is"
    kaggle(monkeypatch, AssertionError("must not be asked"))
    with pytest.raises(UserError, match="already holds"):
        prepare.download_from_kaggle(tmp_path / "one")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (kaggle_error("UnauthenticatedError"), UserError, "KAGGLE_USERNAME"),
        (kaggle_error("KaggleApiHTTPError", 403), UserError, "kaggle.json"),
        (kaggle_error("KaggleApiHTTPError", 401), UserError, "kaggle.json"),
        (kaggle_error("KaggleApiHTTPError", 500), RunError, "server said no"),
        (kaggle_error("ConnectTimeout", None, OSError, type("ConnectionError", (Exception,), {})), RunError, "offline"),
        (ConnectionError("no route to host"), RunError, "offline"),
        (OSError(errno.ENOSPC, "No space left on device"), RunError, "free about"),
        (ValueError("what?"), RunError, "what?"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:20],
)
def test_failed_download_says_what_to_do(tmp_path, monkeypatch, error, kind, message):
    kaggle(monkeypatch, error)
    with pytest.raises(kind, match=message):
        prepare.download_from_kaggle(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_download_without_kagglehub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(UserError, match="pip install kagglehub") as caught:
        prepare.download_from_kaggle(tmp_path / "data")
    assert "prepare --archive" in str(caught.value)
