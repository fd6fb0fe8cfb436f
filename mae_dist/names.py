"""Checks of file names that a library would read as something else.

Functions return a sentence with the fault and the cure, or "". The characters were found by saving and reading with
each of them.
"""

import os
import re
import sys

BUCKET = "gs://"
HUB = "hf://"
_EPATH_ROOTS = ("/gs/", "/s3/", "/az/", "/hf/")  # etils.epath takes what lies below them for objects of buckets
_REPO, _REVISION = r"(?P<repo>\w[\w.-]*/\w[\w.-]*)", r"(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+)"
_HUB_PLACE = re.compile(rf"{_REPO}(?:@{_REVISION})?(?P<path>(?:/(?!\.\.?(?:/|$))[^/@]+)*/?)", re.ASCII)
# What is typed or copied instead: hf:/OWNER/NAME, and addresses of the hub's pages.
_HUB_PAGE = re.compile(
    r"(?:hf:/{0,3}|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)"
    rf"(?:{_REPO}(?:/(?:tree|blob|resolve|raw)/{_REVISION})?(?P<path>(?:/[^/?#]+)*))?",
    re.ASCII | re.IGNORECASE,
)
_CONTROL = "".join(map(chr, (*range(32), 127)))


def scheme_fault(path: str) -> str:
    """Returns the fault in the beginning of a path as given: a file of this machine, or gs://."""
    if path.startswith(HUB):
        return (
            f"{path!r} is on the Hugging Face hub, from which only weights are read (init_from, and where a command "
            "reads a model); here give a path of this machine, or gs://BUCKET/…"
        )
    if fault := hub_fault(path):
        return fault
    scheme = re.match(r"\w+:/+", path)
    if scheme is None or scheme[0] == BUCKET:
        return ""
    return (
        f"{path!r} begins with {scheme[0]!r}; give a path of this machine, or gs://BUCKET/… of Google Cloud Storage "
        f"(a directory that really has such a name is './{path}')"
    )


def hub_fault(name: str) -> str:
    """Returns the fault of a place on the Hugging Face hub, or of a text that was meant as one; "" for other paths."""
    if name.startswith(HUB):
        place = name.removeprefix(HUB)
        if re.match(r"(datasets|spaces)/[^/]+/", place):
            return f"{name!r} is no model; weights are in the repositories of models: {HUB}OWNER/NAME"
        if _HUB_PLACE.fullmatch(place):
            return ""
        return (
            f"{name!r} is no place on the Hugging Face hub; write {HUB}OWNER/NAME, if needed with @REVISION (a branch, "
            "tag or commit) after the name and then a directory or file of the repository"
        )
    page = _HUB_PAGE.match(name)
    if page is None:
        return ""
    owner_and_name, revision, path = page["repo"] or "OWNER/NAME", page["revision"] or "main", page["path"] or ""
    right = HUB + owner_and_name + ("" if revision == "main" else f"@{revision}") + path.rstrip("/")
    return f"{name!r}: a model of the Hugging Face hub is named {right} (a file that has such a name is './{name}')"


def hub_parts(name: str) -> tuple[str, str, str]:
    """Returns OWNER/NAME, the revision and the path in the repository of a place without `hub_fault`; "" if not given.

    A revision with slashes is written with %2F, except the hub's own `refs/pr/N`.
    """
    found = _HUB_PLACE.fullmatch(name.removeprefix(HUB))
    assert found is not None, name
    return found["repo"], (found["revision"] or "").replace("%2F", "/"), found["path"].strip("/")


def with_revision(path: str, revision: str) -> str:
    """Returns a place on the hub with another revision, "" for none; any other path as it is."""
    if not path.startswith(HUB) or hub_fault(path):
        return path
    repo, _, inside = hub_parts(path)
    return HUB + repo + (f"@{revision}" if revision else "") + (f"/{inside}" if inside else "")


def path_fault(path: str) -> str:
    """Returns the fault of an absolute path for any use."""
    if fault := text_fault(path):
        return f"the path {path!r} has {fault}"
    if path.startswith(BUCKET):
        return _character_fault(path, _CONTROL, "Cloud Storage does not take") or _character_fault(
            path, "#?", "ends an object's name for the library that reads buckets (gcsfs)"
        )
    if f"{path}/".startswith(_EPATH_ROOTS):
        return (
            f"the path {path!r} begins with {path[:4]!r}, which the library that opens files (etils.epath) takes for a "
            "bucket; give the path through a symbolic link elsewhere"
        )
    return _character_fault(path, _CONTROL, "array_record and TFDS do not take")


def checkpoint_fault(path: str, *, saving: bool) -> str:
    """Returns why checkpoints below an absolute path could not be read, or after `saving` not be read back."""
    fault = path_fault(path)  # of a directory found in one that the user gave
    if not fault and not path.startswith(BUCKET):
        fault = _character_fault(path, "\\", "tensorstore reads as an escape: no checkpoint could be read from there")
    if fault or not saving:
        return fault
    # Orbax merges the parts of a checkpoint by a glob of its whole path.
    return _character_fault(path, "[*?", "begins a pattern for Orbax as it saves: no checkpoint could be read back")


def label_fault(name: str) -> str:
    """Returns why a directory's name cannot be that of a class: TFDS writes one to a line, and strips it."""
    if fault := text_fault(name):
        return f"{name!r} has {fault}"
    if name == name.strip() and not set(name) & set(_CONTROL):
        return ""
    return f"{name!r} begins or ends with a space, or has a control character, which TFDS does not keep; rename it"


def text_fault(name: str) -> str:
    """Returns the fault in the bytes of a name or an argument: libraries in C++ read them as UTF-8."""
    try:
        if os.fsencode(name) == name.encode():
            return ""
        byte = ""
    except UnicodeEncodeError as error:
        byte = f"0x{ord(name[error.start]) & 0xFF:02x}"  # Python has U+DC80 to U+DCFF for bytes that are not text
    encoding = sys.getfilesystemencoding()
    if encoding.lower() != "utf-8":
        return f"characters outside ASCII, and this locale's names are in {encoding}; set LC_ALL=C.UTF-8"
    return f"the byte {byte}, which is not UTF-8; rename it, or give the path through a symbolic link"


def _character_fault(path: str, characters: str, why: str) -> str:
    found = next((character for character in path if character in characters), None)
    if found is None:
        return ""
    link = "" if path.startswith(BUCKET) else ", or give the path through a symbolic link with another name"
    return f"the path {path!r} has the character {found!r}, which {why}; rename the directory or file that has it{link}"
