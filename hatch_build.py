"""Makes the description of the package from README.md, for an index that does not have the files it links to."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_IMAGE = re.compile(r"!\[[^\]]*\]\((?!https?:)([^)\s]+)\)\n*")
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


class Description(MetadataHookInterface):
    """The hook that `pyproject.toml` turns on: `readme` is dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the description of the package."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = absolute(text, metadata.get("urls", {}).get("Repository"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute(text: str, repository: str | None) -> str:
    """Return a page of Markdown whose relative links lead to a repository. Without one, only their texts are left."""
    if repository is None:
        return _LINK.sub(r"\1", _IMAGE.sub("", text))
    base = repository.rstrip("/")
    text = _IMAGE.sub(lambda match: match[0].replace(f"({match[1]})", f"({base}/raw/HEAD/{match[1]})"), text)
    return _LINK.sub(rf"[\1]({base}/blob/HEAD/\2)", text)
