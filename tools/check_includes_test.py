# SPDX-License-Identifier: Apache-2.0
"""Every rule of check_includes.py, on a small tree that keeps it and one that breaks it."""

import pathlib
import tempfile
import unittest

import check_includes

LICENCE = "// SPDX-License-Identifier: Apache-2.0\n"


class CheckIncludesTest(unittest.TestCase):
    def violations(self, files):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            for path, text in files.items():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text(text, encoding="utf-8")
            return check_includes.check_tree(root)[0]

    def include(self, source, target, header=LICENCE):
        """The violations of one file with one include of our own."""
        return self.violations({source: header + f'#include "{target}"\n', target: LICENCE})

    def outside(self, source, target):
        return self.violations({source: LICENCE + f"#include <{target}>\n"})

    def test_every_arrow_of_the_figure_is_allowed(self):
        for source, target in [
            ("infllm/ops/a.cc", "infllm/core/b.h"),
            ("infllm/backend/cpu/a.cc", "infllm/ops/b.h"),
            ("infllm/backend/cpu/a.cc", "infllm/backend/host_memory.h"),
            ("infllm/backend/open.cc", "infllm/backend/cpu/b.h"),
            ("infllm/backend/cuda/sm90/a.cu", "infllm/backend/cuda/sm80/b.h"),
            ("infllm/backend/cuda/sm80/a.cu", "infllm/backend/cuda/tile/b.h"),
            ("infllm/model/a.cc", "infllm/ops/b.h"),
            ("infllm/engine/a.cc", "infllm/model/b.h"),
            ("infllm/app/a.cc", "infllm/backend/b.h"),
            ("tests/a_test.cc", "tests/support/b.h"),
            ("bench/a_bench.cc", "infllm/engine/b.h"),
            ("fuzz/a_fuzz.cc", "infllm/engine/b.h"),
        ]:
            with self.subTest(source=source, target=target):
                self.assertEqual(self.include(source, target), [])

    def test_an_include_against_an_arrow_is_found(self):
        for source, target in [
            ("infllm/core/a.cc", "infllm/ops/b.h"),
            ("infllm/ops/a.cc", "infllm/backend/b.h"),
            ("infllm/ops/a.cc", "infllm/model/b.h"),
            ("infllm/backend/cpu/a.cc", "infllm/backend/reference/b.h"),
            ("infllm/backend/cpu/a.cc", "infllm/backend/open.h"),
            ("infllm/backend/cpu/a.cc", "infllm/model/b.h"),
            ("infllm/backend/cuda/sm80/a.cu", "infllm/backend/cuda/sm90/b.h"),
            ("infllm/backend/cuda/tile/a.cuh", "infllm/core/b.h"),
            ("infllm/model/a.cc", "infllm/backend/b.h"),
            ("infllm/model/a.cc", "infllm/engine/b.h"),
            ("infllm/engine/a.cc", "infllm/app/b.h"),
            ("bench/a_bench.cc", "tests/b.h"),
            ("fuzz/a_fuzz.cc", "infllm/app/b.h"),
        ]:
            with self.subTest(source=source, target=target):
                (line,) = self.include(source, target)
                self.assertIn(f"{source}:2: includes \"{target}\" against the arrows", line)

    def test_a_folder_with_a_longer_name_is_another_folder(self):
        self.assertNotEqual(self.include("infllm/core/a.cc", "infllm/core_extra/b.h"), [])

    def test_a_path_that_does_not_start_at_the_root_is_found(self):
        (line,) = self.violations(
            {"infllm/core/a.cc": LICENCE + '#include "b.h"\n', "infllm/core/b.h": LICENCE})
        self.assertIn("no file from the repository's root", line)

    def test_outside_libraries_stay_in_their_folders(self):
        self.assertEqual(self.outside("infllm/app/main.cc", "CLI/CLI.hpp"), [])
        self.assertEqual(self.outside("infllm/core/json.h", "nlohmann/json_fwd.hpp"), [])
        self.assertEqual(self.outside("infllm/model/config.cc", "nlohmann/json.hpp"), [])
        self.assertEqual(self.outside("infllm/backend/cpu/simd-inl.h", "hwy/highway.h"), [])
        for source, target in [
            ("infllm/engine/a.cc", "CLI/CLI.hpp"),
            ("infllm/engine/a.cc", "boost/beast.hpp"),
            ("infllm/ops/a.cc", "hwy/highway.h"),
            ("infllm/ops/a.cc", "nlohmann/json.hpp"),
            ("infllm/core/a.cc", "gtest/gtest.h"),
        ]:
            with self.subTest(source=source, target=target):
                (line,) = self.outside(source, target)
                self.assertIn(f"includes <{target}>, which only", line)

    def test_a_header_may_bring_a_heavy_library_to_sources_but_not_to_headers(self):
        files = {
            "infllm/model/fields.h": LICENCE + "#include <nlohmann/json.hpp>\n",
            "infllm/model/config.cc": LICENCE + '#include "infllm/model/fields.h"\n',
        }
        self.assertEqual(self.violations(files), [])
        files["infllm/model/config.h"] = files["infllm/model/config.cc"]
        (line,) = self.violations(files)
        self.assertIn("infllm/model/config.h:2: ", line)
        self.assertIn("which brings <nlohmann/json.hpp>, in a header", line)

    def test_a_missing_licence_line_is_found(self):
        for path in ["infllm/core/a.cc", "tools/a.py", "tools/a.sh", "CMakeLists.txt", ".ci/run"]:
            with self.subTest(path=path):
                (line,) = self.violations({path: "x\n"})
                self.assertIn(f"{path}:1: does not begin with", line)

    def test_long_files_are_reported_without_failing(self):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            for path, lines in [("infllm/core/a.h", 201), ("infllm/core/a.cc", 401),
                                ("infllm/backend/cpu/a-inl.h", 600)]:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text(LICENCE + "\n" * (lines - 1), encoding="utf-8")
            violations, long_files = check_includes.check_tree(root)
        self.assertEqual(violations, [])
        self.assertEqual(long_files, ["infllm/core/a.cc: 401 lines, guide figure 400",
                                      "infllm/core/a.h: 201 lines, guide figure 200"])


if __name__ == "__main__":
    unittest.main()
