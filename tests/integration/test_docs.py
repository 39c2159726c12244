"""The site builds, every link in place, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "strategy" in (tmp_path / "methods" / "one-stream.html").read_text()
    for page in tmp_path.rglob("*.html"):
        assert not re.search(r'src="http|rel="(stylesheet|preconnect)" href="http', page.read_text()), page
