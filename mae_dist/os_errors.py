"""Cures for errors of the operating system, by errno."""

import errno
import os

_IN_THE_WAY = "A file has the name of a directory that is needed: move it away, or choose another place"
_NOT_ALLOWED = "This user may not: change the permissions of the file or its directory, or choose another place"
_BROKEN = "The disk or network file system fails: read the system's log (dmesg), then choose another place"
_NETWORK = "The network file system does not answer: check the network"
_CURES = {
    errno.ENOSPC: "The disk is full: free some space, or choose a place on another",
    errno.EDQUOT: "The quota of this user is used up: delete something, or ask for a larger one",
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: "The file system is read-only: choose another place",
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.EISDIR: "A directory has the name of a file that is needed: move it away, or choose another place",
    errno.ENOENT: "Its directory does not exist, or it is gone: make it (mkdir -p), or correct the path",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "Symbolic links lead in a circle: correct them",
    errno.EMFILE: "Allow more open files (ulimit -n), or use fewer processes",
    errno.EFBIG: "Files may not become that large: raise the limit (ulimit -f), or choose another file system",
    errno.EIO: _BROKEN,
    errno.ENODEV: _BROKEN,
    errno.ENXIO: _BROKEN,
    errno.ESTALE: _NETWORK,
    errno.ETIMEDOUT: _NETWORK,
    errno.EHOSTDOWN: _NETWORK,
}


def cure(error: BaseException) -> str:
    """Returns what to do about an error or its cause, "" if neither has a known errno.

    Libraries in C++ pass the system's error on as text.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        if isinstance(cause, OSError) and cause.errno in _CURES:
            return _CURES[cause.errno]
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    texts = "\n".join(map(str, chain))
    return next((cure for code, cure in _CURES.items() if os.strerror(code) in texts), "")
