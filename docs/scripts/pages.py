"""Takes benchmarks/README.md and its pictures into the site. A hook of mkdocs.

Links between it and the pages are written as they lie in the repository, so that they hold there too.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

FOLDER = "benchmarks"
OUT_OF_DOCS = re.compile(r"(\]\((?:\.\./)*)\.\./" + FOLDER + "/")


def on_files(files, config, **_):
    root = Path(config["config_file_path"]).parent
    for path in (root / FOLDER / "README.md", *sorted((root / FOLDER / "results").glob("*.png"))):
        files.append(File.generated(config, str(path.relative_to(root)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    if page.file.src_uri.startswith(f"{FOLDER}/"):
        return markdown.replace("](../docs/", "](../")
    return OUT_OF_DOCS.sub(rf"\1{FOLDER}/", markdown)
