"""What the site does with links to files of the repository outside docs/, which it does not have."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link that is a paragraph of its own becomes the file, any other its text.

    Raises:
        FileNotFoundError: a link leads nowhere.
    """
    folder = (DOCS / page.file.src_uri).parent

    def shown(found: re.Match[str]) -> str:
        words, file = found[1], (folder / found[2]).resolve()
        if file.is_relative_to(DOCS):
            return found[0]
        if not file.exists():
            raise FileNotFoundError(f"{page.file.src_uri}: there is no {found[2]}")
        alone = f"\n\n{found[0]}\n\n" in markdown
        return f'```yaml title="{words}"\n{file.read_text()}```' if alone else f"`{words.strip('`')}`"

    return LINK.sub(shown, markdown)
