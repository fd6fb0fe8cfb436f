"""Checks of file names that a library would read as something else.

Functions return a sentence with the fault and the cure, or "". The characters were found by saving and reading with
each of them.
"""

import os
import re
import sys

BUCKET = "gs://"
_EPATH_ROOTS = ("/gs/", "/s3/", "/az/", "/hf/")  # etils.epath takes what lies below them for objects of buckets
_CONTROL = "".join(map(chr, (*range(32), 127)))


def scheme_fault(path: str) -> str:
    """Returns the fault in the beginning of a path as given: a file of this machine, or gs://."""
    scheme = re.match(r"\w+:/+", path)
    if scheme is None or scheme[0] == BUCKET:
        return ""
    return (
        f"{path!r} begins with {scheme[0]!r}; give a path of this machine, or gs://BUCKET/… of Google Cloud Storage "
        f"(a directory that really has such a name is './{path}')"
    )


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
