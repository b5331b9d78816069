"""An image folder: a folder a class, with or without splits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from pipelines.common.errors import UserError
from pipelines.common.words import agreed, plural
from pipelines.image_files import LeftOut, class_folders, image_files, loose_images
from pipelines.prepare.sources.addresses import Location, Remote, listed, plain_name, there
from pipelines.prepare.sources.dataset import Below, Dataset, Images, SourceConfig
from pipelines.prepare.sources.names import hint_for, name_key, read_text, refuse_alike
from pipelines.prepare.sources.texts import Texts
from pipelines.prepare.sources.tree import class_tree, is_image, splits_among


class FolderSource(SourceConfig):
    """An image folder: `train/CLASS/*`, optionally `val/CLASS/*` and `test/CLASS/*`; or `CLASS/*` alone.

    Classes are in alphabetical order, or as the file `classes` says.
    """

    kind: Literal["folder"]
    path: Location = Field(description="the folder: a path, or an address such as s3://bucket/folder")
    classes: Path | None = Field(
        default=None,
        description="which classes, in which order: a folder's name a line, and after a tab, the class's name",
    )

    def open(self) -> Dataset:
        """List the images of all class folders.

        Raises:
            UserError: The folder does not exist, a class has no images, or a name cannot be a class or a split.
        """
        if isinstance(self.path, str):
            return self._behind(self.path)
        root = self.path
        if not root.is_dir():
            hint = hint_for(root) or "; set data.source.path to a folder with train/CLASS/*, or CLASS/*"
            raise UserError(f"image folder {str(root)!r} does not exist{hint}")
        left_out = LeftOut()
        inside = class_folders(root, left_out)
        present = splits_among(inside, f"image folder {str(root)!r}", str(root))
        top = root / "train" if present else root
        folders = class_folders(top, left_out) if present else inside
        names = self._chosen(top, folders)
        if len(names) < 2:
            loose = loose_images(top)
            hint = (
                f"; {plural(loose, 'image', 'are')} directly in it: put those of each class into a folder of its own"
                if loose
                else ""
            )
            below = next((top / name for name in names.values() if len(class_folders(top / name, left_out)) > 1), None)
            if below is not None and not loose:
                hint = f"; {str(below)!r} has several: name that folder"
            raise UserError(f"{str(top)!r} has {plural(len(names), 'class folder')}; at least 2 are needed{hint}")
        for name in names.values():
            if not _is_text(name):
                raise UserError(f"class folder {str(top / name)!r} has a name that is not UTF-8; rename it")
        classes = [*names.values()]
        others = self.classes is not None
        if not present:
            _tell_loose(root)
            images = _labelled(root, "", [*names], left_out, every_class=True, others=others)
            left_out.tell(root)
            return Dataset(classes, images)
        for split in present:
            _tell_loose(root / split)
        splits = {
            split: _labelled(root, split, [*names], left_out, every_class=split == "train", others=others) for split in present
        }
        left_out.tell(root)
        return Dataset(classes, splits["train"], splits.get("val"), splits.get("test"))

    def present(self) -> bool:
        """Whether the folder exists."""
        return there(self.path) if isinstance(self.path, str) else self.path.is_dir()

    def identity(self) -> dict[str, object]:
        """The fields, without `classes` where it is not set, as in earlier versions."""
        return self.model_dump(mode="json", exclude={"classes"} if self.classes is None else None)

    def _behind(self, address: str) -> Dataset:
        """The images of a folder behind an address."""
        names, stamps, left_out = Texts(), Texts(), LeftOut()
        for name, stamp in listed(address):
            if is_image(plain_name(name, address), left_out):
                names.append(name)
                stamps.append(stamp)
        left_out.tell(address)
        if not names:
            raise UserError(f"image folder {address!r} has no images")
        content = Remote(names, stamps, f"{address}/")
        plain = Texts(plain_name(name, address) for name in names) if address.startswith("http") else names
        named = None
        if self.classes is not None:
            named = {name_key(folder): name for folder, name in self._listed().items()}
        dataset = class_tree(plain, content, f"image folder {address!r}", address, named)
        strange = next((name for name in dataset.classes if not _is_text(name)), None)
        if strange is not None:
            raise UserError(f"class folder {strange!r} of {address!r} has a name that is not UTF-8; rename it")
        return dataset

    def class_names(self) -> dict[str, str]:
        """The class of each folder, as the file `classes` says; empty without that file."""
        return {} if self.classes is None or not self.classes.is_file() else self._listed()

    def _listed(self) -> dict[str, str]:
        """Class names by folder name, as the file has them."""
        assert self.classes is not None
        rows: list[tuple[str, str, str]] = []  # place, folder, class
        for number, line in enumerate(read_text(self.classes, "classes").split("\n"), start=1):
            if line.strip():
                folder, _, name = line.partition("\t")
                rows.append((f"{self.classes}:{number}", folder.strip(), name.strip() or folder.strip()))
        places = [place for place, _, _ in rows]
        refuse_alike([folder for _, folder, _ in rows], places)
        refuse_alike([name for _, _, name in rows], places)
        return {folder: name for _, folder, name in rows}

    def _chosen(self, top: Path, folders: list[str]) -> dict[str, str]:
        """Class names by folder name, in label order."""
        if self.classes is None:
            return {folder: folder for folder in folders}
        there = {name_key(folder): folder for folder in folders}
        listed = self._listed()
        for folder in listed:
            if name_key(folder) not in there:
                hint = "; write FOLDER, or FOLDER, a tab and NAME" if " " in folder else ""
                raise UserError(f"{self.classes} names {folder!r}, which is no folder in {str(top)!r}{hint}")
        if len(listed) < len(folders):
            print(f"data: {len(listed)} of {len(folders)} class folders, as {str(self.classes)!r} says", file=sys.stderr)
        return {there[name_key(folder)]: name for folder, name in listed.items()}


def open_folder(folder: Path, classes: list[str], class_names: dict[str, str] | None = None) -> Images:
    """The images of `folder/CLASS/*`, labelled by the given class names.

    Args:
        folder: The folder.
        classes: Names in label order.
        class_names: The classes of folders that have another name.

    Returns:
        The images; a class without a folder has none.

    Raises:
        UserError: The folder has a class that is not among them, two folders of one class, or no images in class folders.
    """
    if not folder.is_dir():
        raise UserError(f"image folder {str(folder)!r} does not exist{hint_for(folder)}")
    for split in ("test", "val", "train"):
        if split not in classes and (folder / split).is_dir():
            raise UserError(f"{str(folder)!r} has splits; name one of them, as {str(folder / split)!r}")
    refuse_alike(classes, [f"class {number}" for number in range(len(classes))])
    left_out = LeftOut()
    there = class_folders(folder, left_out)
    if not there and (loose := loose_images(folder)):
        raise UserError(
            f"{str(folder)!r} has {plural(loose, 'image')} directly in it, without classes; expected "
            f"{str(folder / 'CLASS')!r}/*"
        )
    refuse_alike(there, [repr(str(folder / name)) for name in there])
    by_folder = {name_key(other): name for other, name in (class_names or {}).items()}
    by_class = {name_key(name): name for name in classes}
    # As training has the folders, if it has all of these: the folders 1, 2 and 3 may be of the classes 0, 1 and 2.
    as_trained = all(name_key(name) in by_folder for name in there)
    named = by_class | by_folder if as_trained else by_folder | by_class
    labels = {name: named.get(name_key(name), name) for name in there}
    strangers = [name for name in there if labels[name] not in classes]
    if strangers:
        raise UserError(f"{str(folder / strangers[0])!r}: the class {strangers[0]!r} is not one of the training classes")
    folders: dict[str, str] = {}
    for name, label in labels.items():
        first = folders.setdefault(label, name)
        if first != name:
            raise UserError(
                f"{str(folder / name)!r}: the class {label!r} has two folders, {first!r} and {name!r}; put the images of both "
                "into one of them"
            )
    of_classes = [folders.get(name, "") for name in classes]
    images = _labelled(folder.parent, folder.name, of_classes, left_out, every_class=False, others=True)
    left_out.tell(folder)
    return images


def _tell_loose(folder: Path) -> None:
    if loose := loose_images(folder):
        print(
            f"data: {plural(loose, 'image')} of {str(folder)!r} {agreed(loose, 'are')} in no class folder, and not read",
            file=sys.stderr,
        )


def _is_text(name: str) -> bool:
    """Whether a file's name can be written and drawn: Python reads bytes of other encodings as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _labelled(root: Path, split: str, folders: list[str], left_out: LeftOut, every_class: bool, others: bool) -> Images:
    """The images of the class folders of one split.

    Args:
        root: What the images' names are relative to.
        split: The folder below `root` that holds the class folders; empty for `root` itself.
        folders: The class folders in label order; empty where a class has none. They may be spelled in another way there.
        left_out: Counts what is not read.
        every_class: Whether each class must have an image.
        others: Whether further class folders are left out, rather than refused.

    Raises:
        UserError: A class has no images or two folders, a folder is refused, or there are no images.
    """
    keys = [name_key(folder) for folder in folders]
    inside, known = class_folders(root / split, LeftOut()), {*keys}
    read = [name for name in inside if name_key(name) in known]
    refuse_alike(read, [repr(str(root / split / name)) for name in read])
    there = {name_key(name): name for name in inside}
    strangers = sorted(there[key] for key in there.keys() - known)
    if strangers and not others:
        raise UserError(f"{str(root / split / strangers[0])!r}: the class {strangers[0]!r} is not one of the training classes")
    found_names = Texts()
    labels: list[np.ndarray] = []
    for label, key in enumerate(keys):
        name = there.get(key)
        found = [] if name is None else image_files(root / split / name, left_out)
        if not found and every_class:
            place = root / split / (name or folders[label])
            way = "take it out of the file data.source.classes" if others else "name the others in a file: data.source.classes"
            raise UserError(f"class folder {str(place)!r} has no images (.jpg, .png, .tif and the like); move it out, or {way}")
        place = Path(split) / (name or "")  # split is empty where root is "."
        found_names.extend(f"{place.as_posix()}/{path}" for path in found)
        labels.append(np.full(len(found), label, dtype=np.int64))
    if not found_names:
        raise UserError(f"{str(root / split)!r} has no images; put some into it, or move it out")
    return Images(found_names, np.concatenate(labels), files=Below(root, found_names))
