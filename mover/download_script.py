"""A shell script that downloads what was retrieved: resumes, checks, unpacks. It holds the links, so it is a secret."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mover.model import raw_files_prefix
from mover.policies.names import check_path
from mover.reports import RetrievedObject
from mover.streams.hashing import digest_of

__all__ = ["download_script"]

_HEAD = r"""#!/bin/sh
# Downloads a dataset: resumes what was interrupted, checks it, unpacks it.
#   sh SCRIPT [--keep] [FOLDER]
# --keep keeps the tar files after unpacking, in FOLDER/.datablocks. What is there and right is not loaded again.
# This file holds download links: whoever has it can load the data. Keep it to yourself.
set -u
dataset=@DATASET@
expires=@EXPIRES@
folder=@FOLDER@
keep=no
while [ $# -gt 0 ]; do
  case $1 in
    --keep) keep=yes ;;
    -h|--help) printf 'usage: sh SCRIPT [--keep] [FOLDER]\n'; exit 0 ;;
    --) shift; [ $# -gt 0 ] && folder=$1; break ;;
    -*) printf 'unknown option %s; usage: sh SCRIPT [--keep] [FOLDER]\n' "$1" >&2; exit 2 ;;
    *) folder=$1 ;;
  esac
  shift
done
case $folder in /*) ;; *) folder=./$folder ;; esac

complain() { printf '%s\n' "$*" | tr '\001-\011\013-\037\177' '?' >&2; }
need() { command -v "$1" >/dev/null 2>&1 || { complain "this script needs $1, which is not installed"; exit 1; }; }
need curl
need tar
if command -v sha256sum >/dev/null 2>&1; then
  sha256_of() { sha256sum <"$1" | cut -c 1-64; }
elif command -v shasum >/dev/null 2>&1; then
  sha256_of() { shasum -a 256 <"$1" | cut -c 1-64; }
else
  complain 'this script needs sha256sum or shasum, neither is installed'
  exit 1
fi
bytes_of() { if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else printf 0; fi; }

# is_right FILE BYTES SHA256: the file is there and is the one that was archived, as far as is known
is_right() {
  [ -f "$1" ] && [ "$(bytes_of "$1")" = "$2" ] || return 1
  [ -z "$3" ] || [ "$(sha256_of "$1")" = "$3" ]
}

# load FILE BYTES URL: completes FILE; gives up after 5 attempts in a row that bring nothing
load() {
  attempts=0
  [ "$(bytes_of "$1")" -le "$2" ] || rm -f -- "$1"
  [ "$2" -gt 0 ] || : >"$1"
  while [ "$(bytes_of "$1")" -lt "$2" ]; do
    before=$(bytes_of "$1")
    # the link goes through a pipe: arguments are shown to every user of this computer
    printf 'url = "%s"\n' "$3" | curl --config - --fail --location --silent --show-error --globoff \
      --retry 3 --connect-timeout 30 --speed-limit 1 --speed-time 120 -C - --output "$1"
    status=$?
    if [ "$(bytes_of "$1")" -gt "$before" ]; then
      attempts=0
    else
      attempts=$((attempts + 1))
      [ $attempts -lt 5 ] && [ $status -ne 22 ] || return 1
      sleep "${DOWNLOAD_PAUSE:-2}"
    fi
  done
  [ "$(bytes_of "$1")" = "$2" ]
}

failed=
failures=0
give_up() {
  failures=$((failures + 1))
  [ $failures -gt 100 ] || failed="$failed
  $1"
  complain "FAILED  $1 ($2)"
}

# fetch PART FILE BYTES SHA256 URL: PART is where an unfinished file grows
fetch() {
  is_right "$2" "$3" "$4" && { complain "ok      $2 (was there)"; return 0; }
  mkdir -p -- "$(dirname -- "$2")" || { give_up "$2" 'its folder cannot be made'; return 1; }
  for round in 1 2; do
    load "$1" "$3" "$5" || { give_up "$2" 'the download failed; what came is kept for the next time'; return 1; }
    if is_right "$1" "$3" "$4"; then
      mv -f -- "$1" "$2" || { give_up "$2" 'it cannot be renamed'; return 1; }
      complain "ok      $2"
      return 0
    fi
    rm -f -- "$1"  # resuming would never mend it
    complain "again   $2 (its bytes are not the archived ones, round $round)"
  done
  give_up "$2" 'its checksum is not the archived one'
  return 1
}

# datablock ID NAME BYTES SHA256 URL
datablock() {
  tars=$folder/.datablocks
  [ "$(cat -- "$tars/$2.done" 2>/dev/null)" = "$3 $4" ] && { complain "ok      $2 (was unpacked)"; return 0; }
  fetch "$tars/$1.part" "$tars/$2" "$3" "$4" "$5" || return 0
  tar -xof "$tars/$2" -C "$folder" || { give_up "$2" 'tar cannot unpack it'; return 0; }
  printf '%s\n' "$3 $4" >"$tars/$2.done" || { give_up "$2" 'its mark cannot be written'; return 0; }
  [ $keep = yes ] || rm -f -- "$tars/$2"
}

# file ID PATH BYTES SHA256 URL
file() {
  fetch "$folder/.download-$1.part" "$folder/$2" "$3" "$4" "$5" || return 0
}

mkdir -p -- "$folder" || exit 1
if [ @FORM@ = datablocks ]; then mkdir -p -- "$folder/.datablocks" || exit 1; fi
complain "dataset $dataset goes to $folder (the links work until $expires)"
"""

_TAIL = r"""
if [ $failures -gt 0 ]; then
  complain "$failures of @COUNT@ failed:$failed"
  complain "run the script again to go on; after $expires ask for new links"
  exit 1
fi
complain "done: dataset $dataset is in $folder"
"""


def download_script(
    dataset_id: str,
    objects: Sequence[RetrievedObject],
    form: Literal["datablocks", "files"],
    expires_at: str = "the time that was told with them",
) -> str:
    """A POSIX shell script for ``curl`` and ``tar`` that loads ``objects`` into a folder.

    Raises:
        HostileNameError: an object's path could leave the folder.
    """
    head = (
        _HEAD.replace("@DATASET@", _quoted(dataset_id))
        .replace("@EXPIRES@", _quoted(expires_at))
        .replace("@FOLDER@", _quoted(dataset_id.replace("/", "-")))
        .replace("@FORM@", form)
    )
    prefix = raw_files_prefix(dataset_id)
    lines = [head]
    for item in objects:
        path = item.key.rpartition("/")[2] if form == "datablocks" else item.key.removeprefix(prefix)
        check_path(path)
        identity = digest_of(item.key.encode())
        words = (identity, _quoted(path), str(item.size_bytes), _quoted(item.sha256), _quoted(_in_config(item.url)))
        lines.append(f"{form.removesuffix('s')} {' '.join(words)}\n")
    lines.append(_TAIL.replace("@COUNT@", str(len(objects))))
    return "".join(lines)


def _quoted(text: str) -> str:
    """One word of the shell, whatever it holds."""
    return "'" + text.replace("'", "'\\''") + "'"


def _in_config(url: str) -> str:
    """A URL between the double quotes of curl's configuration."""
    return url.replace("\\", "\\\\").replace('"', '\\"')
