"""Renders kustomizations without kustomize: what deploy/kubernetes uses, and nothing else.

A field or a list that it does not know is an error. Where kubectl or kustomize is installed, a test
compares both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

Object = dict[str, Any]

FIELDS = {
    "apiVersion",
    "kind",
    "namespace",
    "resources",
    "components",
    "images",
    "configMapGenerator",
    "patches",
}
CLUSTER_SCOPED = {"Namespace"}
#: What identifies an element of a list; other lists are replaced as a whole.
MERGE_KEYS = {
    "containers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}
ATOMIC = {
    "args",
    "command",
    "matchExpressions",
    "preferredDuringSchedulingIgnoredDuringExecution",
    "requiredDuringSchedulingIgnoredDuringExecution",
    "tolerations",
    "values",
}
_HASH_LETTERS = str.maketrans({"0": "g", "1": "h", "3": "k", "a": "m", "e": "t"})


class Unknown(Exception):
    """A kustomization uses what this renderer does not know."""


def load(path: Path) -> list[Object]:
    """Return the documents of a YAML file."""
    return load_text(path.read_text(encoding="utf-8"))


def load_text(text: str) -> list[Object]:
    """Return the documents of a YAML text."""
    yaml = YAML(typ="safe", pure=True)
    # 1.1, as Kubernetes has it, would read `on` as true; a key that is there twice is refused.
    yaml.allow_duplicate_keys = False
    return [each for each in yaml.load_all(text) if each is not None]


def render(folder: Path) -> list[Object]:
    """Return the objects of a kustomization."""
    objects = _build(folder, [])
    _name_config_maps(objects)
    for each in objects:
        each.pop("__generated__", None)
    return objects


def _build(folder: Path, given: list[Object]) -> list[Object]:
    (settings,) = load(folder / "kustomization.yaml")
    if unknown := settings.keys() - FIELDS:
        raise Unknown(f"{folder}: {sorted(unknown)}")
    objects = given
    for name in settings.get("resources", ()):
        path = folder / name
        for each in _build(path, []) if path.is_dir() else load(path):
            _add(objects, each)
    for name in settings.get("components", ()):
        objects = _build(folder / name, objects)
    for generator in settings.get("configMapGenerator", ()):
        _generate(objects, generator)
    for patch in settings.get("patches", ()):
        _patch(objects, patch, folder)
    for image in settings.get("images", ()):
        _replace_image(objects, image)
    if namespace := settings.get("namespace"):
        for each in objects:
            if each["kind"] not in CLUSTER_SCOPED:
                each["metadata"]["namespace"] = namespace
    return objects


def key_of(each: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return what identifies an object within one namespace."""
    return each["apiVersion"], each["kind"], each["metadata"]["name"]


def _add(objects: list[Object], new: Object) -> None:
    if any(key_of(each) == key_of(new) for each in objects):
        raise Unknown(f"{key_of(new)} is there twice")
    objects.append(new)


def _generate(objects: list[Object], generator: Object) -> None:
    if unknown := generator.keys() - {"name", "behavior", "literals"}:
        raise Unknown(f"configMapGenerator: {sorted(unknown)}")
    data = dict(literal.split("=", 1) for literal in generator["literals"])
    key = ("v1", "ConfigMap", generator["name"])
    known = next((each for each in objects if key_of(each) == key), None)
    behavior = generator.get("behavior", "create")
    if behavior not in {"create", "merge"} or (behavior == "merge") != (known is not None):
        raise Unknown(f"configMapGenerator {generator['name']}: behavior {behavior}")
    if known is not None:
        known["data"].update(data)
        return
    made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}}
    objects.append({**made, "data": data, "__generated__": True})


def _patch(objects: list[Object], patch: Object, folder: Path) -> None:
    if patch.keys() not in ({"path"}, {"patch"}):
        raise Unknown(f"patches: {sorted(patch)}")
    changes = load(folder / patch["path"]) if "path" in patch else load_text(patch["patch"])
    for change in changes:
        index = next((i for i, each in enumerate(objects) if key_of(each) == key_of(change)), None)
        if index is None:
            raise Unknown(f"a patch for {key_of(change)}, which is not there")
        if change.get("$patch") == "delete":
            del objects[index]
        else:
            objects[index] = _merged(objects[index], change, "")


def _merged(old: Any, new: Any, name: str) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        if "$patch" in new:
            raise Unknown(f"$patch in {name}")
        result = dict(old)
        for key, value in new.items():
            if value is None:
                result.pop(key, None)
            else:
                result[key] = _merged(old.get(key), value, key) if key in old else value
        return result
    if isinstance(old, list) and isinstance(new, list) and name not in ATOMIC:
        key = MERGE_KEYS.get(name)
        if key is None:
            raise Unknown(f"a patch of the list {name}")
        result_list = list(old)
        for each in new:
            index = next((i for i, was in enumerate(old) if was[key] == each[key]), None)
            if index is None:
                result_list.append(each)
            else:
                result_list[index] = _merged(old[index], each, "")
        return result_list
    return new


def _replace_image(objects: list[Object], image: Object) -> None:
    if image.keys() != {"name", "newName", "newTag"}:
        raise Unknown(f"images: {sorted(image)}")
    for each in objects:
        template = each.get("spec", {}).get("template")
        for container in template["spec"]["containers"] if template else ():
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"


def _name_config_maps(objects: list[Object]) -> None:
    """Give generated maps names that change with their content, so that pods start anew with it."""
    names = {}
    for each in objects:
        if each.get("__generated__"):
            name = each["metadata"]["name"]
            # Kustomize means to hash the name as well, and finds it empty.
            content = {"data": each["data"], "kind": "ConfigMap", "name": ""}
            text = json.dumps(content, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
            digest = hashlib.sha256(text.encode()).hexdigest()[:10].translate(_HASH_LETTERS)
            names[name] = each["metadata"]["name"] = f"{name}-{digest}"
    for each in objects:
        template = each.get("spec", {}).get("template")
        for container in template["spec"]["containers"] if template else ():
            for source in container.get("envFrom", ()):
                if reference := source.get("configMapRef"):
                    reference["name"] = names.get(reference["name"], reference["name"])
