"""Takes benchmarks/README.md with its pictures, and the examples, into the site. A hook of mkdocs.

Links between them and the pages are written as they lie in the repository, so that they hold there too.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

FOLDER = "benchmarks"
TAKEN = (f"{FOLDER}/README.md", f"{FOLDER}/results/*.png", "examples/*")
OUT_OF_DOCS = re.compile(rf"(\]\((?:\.\./)*)\.\./({FOLDER}|examples)/")


def on_files(files, config, **_):
    root = Path(config["config_file_path"]).parent
    for path in (path for pattern in TAKEN for path in sorted(root.glob(pattern)) if path.is_file()):
        files.append(File.generated(config, str(path.relative_to(root)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    if page.file.src_uri.startswith(f"{FOLDER}/"):
        return markdown.replace("](../docs/", "](../")
    return OUT_OF_DOCS.sub(r"\1\2/", markdown)
