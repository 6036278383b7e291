"""Everything that may touch the network: the hub's data sets and tokenizers, with a one-sentence error if it cannot be reached.

Without a network the hub's clients retry for most of a minute. Here the local cache is asked first. If the answer is not there,
the hub gets one short request; if it does not answer, the clients are put into offline mode for the call.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atat_fast.errors import UsageError, first_line

KNOCK_SECONDS = 4.0
NO_NETWORK = "use corpus python-docs, the path of local files, or download the data set where there is a network"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_repository(name: str) -> bool:
    """Whether `name` could be a hub id: name or owner/name."""
    return _REPOSITORY.fullmatch(name) is not None


def load_dataset(
    repository: str,
    configuration: str | None,
    revision: str | None,
    split: str | None,
    corpus: str,
    *,
    what: str = "corpus",
    remedy: str = NO_NETWORK,
) -> Any:
    """`datasets.load_dataset` for `corpus`. Every failure is a UsageError that names it (`what`: its kind) and the remedy."""
    import datasets

    offline = False
    try:
        # datasets looks into its local cache only after the hub failed to answer, so ask whether it answers first.
        offline = not reachable()
        with offline_mode() if offline else contextlib.nullcontext():
            return datasets.load_dataset(repository, configuration, revision=revision, split=split)
    except Exception as error:
        if offline:
            raise UsageError(
                f"{what} {corpus} needs the data set {repository}, which is not in the local cache, and the hub cannot be "
                f"reached; {remedy}"
            ) from error
        raise UsageError(f"{what} {corpus}: data set {repository} cannot be loaded: {first_line(error)}") from error


def tokenizer_file(repository: str) -> Path:
    """Path of the repository's tokenizer.json, downloaded if it is not cached. Raises UsageError."""
    import huggingface_hub

    name = "tokenizer.json"
    try:
        with contextlib.suppress(OSError):
            return Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=True))
        if reachable():
            return Path(huggingface_hub.hf_hub_download(repository, name))
    except Exception as error:
        raise UsageError(f"tokenizer {repository!r} is no hub id with a {name}: {first_line(error)}") from error
    raise UsageError(
        f"tokenizer {repository!r} is not in the local cache and the hub cannot be reached; use tokenizer bytes or bpe-4096, "
        f"or the path of a {name}"
    )


def reachable() -> bool:
    """Whether the hub answers; asked once per process, for at most KNOCK_SECONDS."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    return _answers(huggingface_hub.constants.ENDPOINT)


@functools.lru_cache
def _answers(address: str) -> bool:
    heard = threading.Event()

    def knock() -> None:
        try:
            # urllib follows the proxy settings of the environment, as the hub's client does.
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=KNOCK_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # refused, but it answered
        except (OSError, ValueError):
            return
        heard.set()

    # In a thread, because looking up a name can take long and has no timeout.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(KNOCK_SECONDS)
    return heard.is_set()


@contextlib.contextmanager
def offline_mode() -> Iterator[None]:
    """Inside the block the hub's clients answer from the local cache alone."""
    import datasets
    import huggingface_hub

    places: list[Any] = [huggingface_hub.constants, datasets.config]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
