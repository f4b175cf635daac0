# SPDX-License-Identifier: Apache-2.0
"""Every relative link of the documents leads to a file."""

import pathlib
import re
import unittest

ROOT = pathlib.Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)#\s]+)")


class LinksTest(unittest.TestCase):
    def test_links_lead_to_files(self):
        for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/*/*.md")]:
            for target in LINK.findall(document.read_text(encoding="utf-8")):
                if "://" not in target:
                    with self.subTest(document=document.relative_to(ROOT), target=target):
                        self.assertTrue((document.parent / target).exists())


if __name__ == "__main__":
    unittest.main()
