"""Files of a run or a shards folder, on a local path or any pyarrow filesystem URI (``s3://``, ``gs://``, ``file://``).

Whatever a kill can interrupt is written beside its name and renamed, so a reader sees the old file or the new one.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.fs

from raydc.config import UsageError

PART = ".part"  # ends the name of what is not whole yet


class Folder:
    """A folder on some filesystem; every path given to a method is relative to it.

    Picklable, so a worker on another node opens the same folder.
    """

    def __init__(self, uri: str | os.PathLike) -> None:
        self.uri = str(uri)
        if "://" in self.uri:
            try:
                self.fs, self.root = pyarrow.fs.FileSystem.from_uri(self.uri)
            except (pa.ArrowInvalid, OSError) as error:
                raise UsageError(
                    f"{self.uri!r} is not a place pyarrow can open ({error}); use a local path, s3://, gs:// or file://"
                ) from None
        else:
            self.uri = str(Path(self.uri).expanduser().absolute())
            self.fs, self.root = pyarrow.fs.LocalFileSystem(), self.uri
        self.root = self.root.rstrip("/")

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    def __reduce__(self):
        return Folder, (self.uri,)

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pyarrow.fs.LocalFileSystem)

    def path(self, name: str = "") -> str:
        """The path of ``name`` in the terms of ``self.fs``."""
        return f"{self.root}/{name}" if name else self.root

    def place(self, name: str) -> str:
        """The path or URI of ``name`` as a person gives it; a URI keeps its options (``?region=...``) at its end."""
        uri, mark, options = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return f"{uri.rstrip('/')}/{name}{mark}{options}"

    def sibling(self, name: str) -> Folder:
        """Of the same parent."""
        uri, mark, options = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return Folder(f"{uri.rstrip('/').rpartition('/')[0]}/{name}{mark}{options}")

    def child(self, name: str) -> Folder:
        return Folder(self.place(name))

    def exists(self, name: str = "") -> bool:
        return self.fs.get_file_info(self.path(name)).type != pyarrow.fs.FileType.NotFound

    def is_file(self, name: str = "") -> bool:
        return self.fs.get_file_info(self.path(name)).type == pyarrow.fs.FileType.File

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.root.rpartition("/")[2]

    def names(self, name: str = "") -> list[str]:
        """Sorted base names of what is directly inside the folder; empty when there is no such folder."""
        selector = pyarrow.fs.FileSelector(self.path(name), allow_not_found=True)
        return sorted(info.base_name for info in self.fs.get_file_info(selector))

    def size(self, name: str) -> int:
        return self.fs.get_file_info(self.path(name)).size

    def read(self, name: str) -> bytes:
        with self.fs.open_input_stream(self.path(name)) as file:
            return file.read()

    def write(self, name: str, data: bytes | str) -> None:
        """Write beside and rename; the previous file survives a kill or a full disk."""
        data = data.encode() if isinstance(data, str) else data
        path = self.path(name)
        self.fs.create_dir(path.rpartition("/")[0], recursive=True)
        if not self.is_local:  # an object store shows an object only when its upload is complete
            with self.fs.open_output_stream(path) as file:
                file.write(data)
            return
        beside = f"{path}.{uuid.uuid4().hex[:8]}{PART}"
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise

    def sweep(self, name: str = "", files: str = ".+") -> None:
        """Remove from the folder what kills left of writes to ``files`` (a regular expression of whole names)."""
        for one in self.names(name) if self.is_local else ():
            if re.fullmatch(rf"(?:{files})\.[0-9a-f]{{8}}{re.escape(PART)}", one):
                self.delete(f"{name}/{one}" if name else one)

    def read_json(self, name: str):
        return json.loads(self.read(name))

    def write_json(self, name: str, value) -> None:
        self.write(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def delete(self, name: str) -> None:
        if self.exists(name):
            self.fs.delete_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        if self.exists(name):
            self.fs.delete_dir(self.path(name))
