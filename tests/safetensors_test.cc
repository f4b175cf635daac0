// SPDX-License-Identifier: Apache-2.0
//
// Every rule of the loader with a file that breaks it, and the message that says so.
#include "infllm/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <filesystem>

#include "infllm/core/mapped_file.h"
#include "infllm/model/checkpoint.h"
#include "tests/support/safetensors_file.h"

namespace infllm::model {
namespace {

namespace fs = std::filesystem;
using ::infllm::testing::FileTensor;
using ::infllm::testing::safetensors_bytes;
using ::infllm::testing::TemporaryFolder;
using ::infllm::testing::write_file;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string parse_message(const std::string& file) {
  const auto entries =
      parse_safetensors(std::as_bytes(std::span(file.data(), file.size())), "weights");
  return entries.ok() ? "accepted" : entries.status().message();
}

std::string header_message(std::string_view header, std::size_t data_bytes = 0) {
  return parse_message(safetensors_bytes(header, std::string(data_bytes, '\0')));
}

// One tensor "t".
std::string tensor_message(std::string_view dtype, std::string_view shape, std::string_view offsets,
                           std::size_t data_bytes) {
  std::string header = R"({"t":{"dtype":")";
  header.append(dtype).append(R"(","shape":)").append(shape).append(R"(,"data_offsets":)");
  return header_message(header.append(offsets).append("}}"), data_bytes);
}

TEST(Safetensors, ReadsTensorsOfEveryTypeAndRank) {
  const std::string file = safetensors_bytes(
      R"({"__metadata__":{"format":"pt"},
          "matrix":{"dtype":"BF16","shape":[2,3],"data_offsets":[8,20]},
          "empty":{"dtype":"F32","shape":[0,4],"data_offsets":[8,8]},
          "scalar":{"dtype":"F64","shape":[],"data_offsets":[0,8]},
          "odd":{"dtype":"BOOL","shape":[1],"data_offsets":[20,21]},
          "after":{"dtype":"F16","shape":[1,1,1,1,1,1,1,2],"data_offsets":[21,25]}}  )",
      std::string(8, 'a') + std::string(12, 'b') + "c" + "dddd");
  const auto result =
      parse_safetensors(std::as_bytes(std::span(file.data(), file.size())), "weights");
  ASSERT_TRUE(result.ok()) << result.status().message();
  const std::vector<SafetensorsEntry>& entries = *result;
  std::vector<std::string> names;
  for (const SafetensorsEntry& entry : entries) names.push_back(entry.name);
  ASSERT_THAT(names, ElementsAre("after", "empty", "matrix", "odd", "scalar"));
  EXPECT_EQ(entries[2].view.dtype, DType::kBF16);
  EXPECT_EQ(shape_string(entries[2].view), "[2, 3]");
  EXPECT_EQ(std::memcmp(entries[2].view.data, "bbbbbbbbbbbb", 12), 0);
  EXPECT_EQ(std::memcmp(entries[0].view.data, "dddd", 4), 0) << "at an odd address";
  EXPECT_EQ(entries[0].view.rank, 8);
  EXPECT_EQ(entries[1].view.elements(), 0);
  EXPECT_EQ(entries[4].view.rank, 0);
  EXPECT_EQ(entries[4].view.elements(), 1);
}

TEST(Safetensors, FileWithoutTensorsIsFine) { EXPECT_EQ(header_message("{}"), "accepted"); }

TEST(Safetensors, HeaderLength) {
  EXPECT_THAT(parse_message(""), HasSubstr("weights: 0 bytes are too few"));
  EXPECT_THAT(parse_message(std::string(9, '\0')), HasSubstr("9 bytes are too few"));
  std::string file = safetensors_bytes("{}", "");
  file[0] = 1;
  EXPECT_THAT(parse_message(file), HasSubstr("a header of 1 bytes, expected 2 to 2"));
  file[0] = 3;
  EXPECT_THAT(parse_message(file), HasSubstr("a header of 3 bytes, expected 2 to 2"));
  std::memset(file.data(), 0xff, 8);
  EXPECT_THAT(parse_message(file), HasSubstr("a header of 18446744073709551615 bytes"));
}

TEST(Safetensors, HeaderLengthHasAnAbsoluteLimit) {
  // 100,000,001 bytes of header that do exist: a sparse file, so that the test needs no memory.
  const TemporaryFolder folder;
  const std::uint64_t length = 100'000'001;
  write_file(folder / "big", {reinterpret_cast<const char*>(&length), sizeof(length)});
  fs::resize_file(folder / "big", length + 100);
  const MappedFile file = MappedFile::open(folder / "big").value();
  EXPECT_THAT(parse_safetensors(file.bytes(), "big").status().message(),
              HasSubstr("a header of 100000001 bytes, expected 2 to 100000000"));
}

TEST(Safetensors, HeaderText) {
  EXPECT_THAT(header_message("[]"), HasSubstr("begins with byte 0x5b, expected '{'"));
  EXPECT_THAT(header_message(" {}"), HasSubstr("begins with byte 0x20"));
  EXPECT_THAT(header_message("{ "), HasSubstr("header: not valid JSON at byte"));
  EXPECT_THAT(header_message("{}x"), HasSubstr("not valid JSON"));
  EXPECT_THAT(header_message("{\"\xff\":1}"), HasSubstr("not valid JSON"));
  EXPECT_THAT(header_message(R"({"a":[[[[1]]]]})"), HasSubstr("nested deeper than 4"));
  EXPECT_THAT(header_message("{\"a\":" + std::string(100'000, '[')),
              HasSubstr("nested deeper than 4"));
  EXPECT_THAT(header_message(R"({"__metadata__":7})"), HasSubstr("__metadata__"));
}

TEST(Safetensors, Names) {
  constexpr std::string_view kBody = R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})";
  const auto named = [&](const std::string& name) {
    return header_message("{\"" + name + std::string(kBody));
  };
  EXPECT_EQ(named("a"), "accepted");
  EXPECT_EQ(named(std::string(512, 'a')), "accepted");
  EXPECT_THAT(named(""), HasSubstr("a tensor name of 0 bytes, expected 1 to 512"));
  EXPECT_THAT(named(std::string(513, 'a')), HasSubstr("a tensor name of 513 bytes"));
  EXPECT_THAT(header_message(R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},
                                 "a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})"),
              HasSubstr("key \"a\" appears twice"));
}

TEST(Safetensors, MessagesShowNamesWithoutControlCharacters) {
  EXPECT_THAT(header_message(R"({"\u001b[31m":{"dtype":"X","shape":[0],"data_offsets":[0,0]}})"),
              AllOf(HasSubstr("\\u001b"), ::testing::Not(HasSubstr("\x1b"))));
}

TEST(Safetensors, NumberOfTensors) {
  std::string header = "{";
  for (int i = 0; i <= 200'000; ++i) {
    header += "\"" + std::to_string(i) + R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)";
  }
  header.back() = '}';
  EXPECT_THAT(header_message(header), HasSubstr("more than 200000 tensors"));
}

TEST(Safetensors, Fields) {
  EXPECT_THAT(header_message(R"({"t":7})"), HasSubstr("tensor \"t\" is not described by"));
  EXPECT_THAT(header_message(R"({"t":{"dtype":"F32","shape":[1]}})", 4),
              HasSubstr("is not described by an object with dtype, shape and data_offsets"));
  EXPECT_THAT(tensor_message("F8_E4M3", "[1]", "[0,1]", 1),
              HasSubstr("tensor \"t\" has the dtype \"F8_E4M3\", expected F64"));
  EXPECT_THAT(tensor_message("F32", "1", "[0,4]", 4), HasSubstr("no shape of at most 8"));
  EXPECT_THAT(tensor_message("U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]", 1),
              HasSubstr("no shape of at most 8 dimensions"));
  EXPECT_THAT(tensor_message("F32", "[-1]", "[0,4]", 4), HasSubstr("has -1 as a dimension"));
  EXPECT_THAT(tensor_message("F32", "[1.0]", "[0,4]", 4), HasSubstr("has 1.0 as a dimension"));
  EXPECT_THAT(tensor_message("F32", "[9223372036854775808]", "[0,4]", 4),
              HasSubstr("has 9223372036854775808 as a dimension"));
  EXPECT_THAT(tensor_message("F32", "[1]", "[0]", 4), HasSubstr("no data_offsets of two"));
  EXPECT_THAT(tensor_message("F32", "[1]", "[0,4,8]", 4), HasSubstr("no data_offsets of two"));
  EXPECT_THAT(tensor_message("F32", "[1]", "[-4,0]", 4), HasSubstr("no data_offsets of two"));
  EXPECT_THAT(tensor_message("F32", "[1]", "[0.0,4.0]", 4), HasSubstr("no data_offsets of two"));
}

TEST(Safetensors, SizesAreCountedWithoutOverflow) {
  // 2^32 * 2^32 elements wrap to zero bytes; 2^62 floats wrap to zero as well.
  EXPECT_THAT(tensor_message("U8", "[4294967296,4294967296]", "[0,0]", 0),
              HasSubstr("expected more than 63 bits can count"));
  EXPECT_THAT(tensor_message("F32", "[4611686018427387904]", "[0,0]", 0),
              HasSubstr("expected more than 63 bits can count"));
  // A zero among the dimensions does not hide an overflow before it.
  EXPECT_THAT(tensor_message("U8", "[4294967296,4294967296,0]", "[0,0]", 0),
              HasSubstr("expected more than 63 bits can count"));
  // Nor one that fits 64 bits without a sign only: views count in int64.
  EXPECT_THAT(tensor_message("U8", "[4611686018427387904,3,0]", "[0,0]", 0),
              HasSubstr("expected more than 63 bits can count"));
  EXPECT_THAT(tensor_message("F32", "[2]", "[0,4]", 4),
              HasSubstr("of f32 [2] has 4 bytes in the file, expected 8"));
  EXPECT_THAT(tensor_message("F32", "[0]", "[0,4]", 4), HasSubstr("has 4 bytes in the file"));
}

TEST(Safetensors, SpansLieInTheData) {
  EXPECT_EQ(tensor_message("F32", "[1]", "[0,4]", 4), "accepted");
  EXPECT_THAT(tensor_message("F32", "[1]", "[4,0]", 4), HasSubstr("lies at bytes 4 to 0"));
  EXPECT_THAT(tensor_message("F32", "[1]", "[0,4]", 3),
              HasSubstr("expected an ascending range within the 3 bytes of data; is the file "
                        "truncated?"));
  EXPECT_THAT(tensor_message("F32", "[1]", "[18446744073709551612,18446744073709551615]", 4),
              HasSubstr("within the 4 bytes"));
  EXPECT_EQ(tensor_message("F32", "[0]", "[0,0]", 0), "accepted");
  EXPECT_THAT(tensor_message("F32", "[0]", "[1,1]", 0), HasSubstr("within the 0 bytes"));
}

TEST(Safetensors, SpansTouchWithoutOverlap) {
  const auto two = [](std::string_view first, std::string_view second, std::size_t bytes) {
    std::string header = R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)";
    header.append(first).append(R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)");
    return header_message(header.append(second).append("}}"), bytes);
  };
  EXPECT_EQ(two("[0,4]", "[4,8]", 8), "accepted");
  EXPECT_EQ(two("[4,8]", "[0,4]", 8), "accepted");
  EXPECT_THAT(two("[0,4]", "[3,7]", 7), HasSubstr("\"b\" begins at byte 3 of the data, expected 4: "
                                                  "it overlaps"));
  EXPECT_THAT(two("[0,4]", "[0,4]", 4), HasSubstr("overlaps another tensor"));
  EXPECT_THAT(two("[0,4]", "[5,9]", 9), HasSubstr("there is a hole before it"));
  EXPECT_THAT(two("[1,5]", "[5,9]", 9), HasSubstr("begins at byte 1 of the data, expected 0"));
  EXPECT_THAT(two("[0,4]", "[4,8]", 9), HasSubstr("end at byte 8 of the data, but there are 9"));
}

TEST(MappedFile, MessagesNameThePath) {
  const TemporaryFolder folder;
  const Status missing = MappedFile::open(folder / "nothing").status();
  EXPECT_EQ(missing.code(), StatusCode::kNotFound);
  EXPECT_THAT(missing.message(), HasSubstr((folder / "nothing").string()));
  EXPECT_THAT(MappedFile::open(folder.path()).status().message(), HasSubstr("not a regular file"));
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_THAT(MappedFile::open(folder / "pipe").status().message(),
              HasSubstr("not a regular file"));
  write_file(folder / "empty", "");
  EXPECT_EQ(MappedFile::open(folder / "empty").value().size(), 0u);
  write_file(folder / "text", "hello");
  MappedFile copy;
  {
    const MappedFile file = MappedFile::open(folder / "text").value();
    copy = file;
  }
  EXPECT_EQ(copy.text(), "hello") << "a copy keeps the mapping";
}

constexpr const char* kFirst = "model-00001-of-00002.safetensors";
constexpr const char* kSecond = "model-00002-of-00002.safetensors";

class CheckpointTest : public ::testing::Test {
 protected:
  void write(std::string_view name, const std::map<std::string, FileTensor>& tensors) {
    write_file(folder_ / name, safetensors_bytes(tensors));
  }
  void write_index(std::string_view weight_map) {
    write_file(folder_ / "model.safetensors.index.json",
               R"({"metadata":{"total_size":8},"weight_map":)" + std::string(weight_map) + "}");
  }
  // Two shards with one tensor each.
  void write_shards() {
    write(kFirst, {{"a", {.shape = {1}}}});
    write(kSecond, {{"b", {.shape = {2}}}});
  }
  std::string message() const {
    const auto source = open_checkpoint(folder_.path());
    return source.ok() ? "accepted" : source.status().message();
  }

  TemporaryFolder folder_;
};

TEST_F(CheckpointTest, SingleFile) {
  write("model.safetensors",
        {{"a", {.shape = {2, 1}, .data = "12345678"}}, {"count", {.dtype = "I32", .shape = {1}}}});
  const auto source = open_checkpoint(folder_.path());
  ASSERT_TRUE(source.ok()) << source.status().message();
  EXPECT_THAT((*source)->names(), ElementsAre("a", "count"));
  const std::int64_t shape[] = {2, 1};
  const WeightTensor tensor = (*source)->tensor("a", shape).value();
  EXPECT_EQ(std::memcmp(tensor.view.data, "12345678", 8), 0);
  EXPECT_THAT((*source)->check("c", shape).status().message(),
              AllOf(HasSubstr("no tensor \"c\", expected one of shape [2, 1]"),
                    HasSubstr(folder_.path().string())));
  const std::int64_t other[] = {2};
  EXPECT_THAT((*source)->tensor("a", other).status().message(),
              HasSubstr("tensor \"a\" has the shape [2, 1], expected [2] from config.json"));
  const std::int64_t one[] = {1};
  EXPECT_THAT((*source)->check("count", one).status().message(),
              HasSubstr("holds i32, expected f64, f32, bf16 or f16"));
}

TEST_F(CheckpointTest, TensorsOutliveTheSource) {
  write("model.safetensors", {{"a", {.shape = {2}, .data = "12345678"}}});
  const std::int64_t shape[] = {2};
  WeightTensor tensor;
  {
    const auto source = open_checkpoint(folder_.path());
    tensor = (*source)->tensor("a", shape).value();
  }
  EXPECT_EQ(std::memcmp(tensor.view.data, "12345678", 8), 0);
}

TEST_F(CheckpointTest, Shards) {
  write_shards();
  write_index(R"({"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"})");
  const auto source = open_checkpoint(folder_.path());
  ASSERT_TRUE(source.ok()) << source.status().message();
  EXPECT_THAT((*source)->names(), ElementsAre("a", "b"));
}

TEST_F(CheckpointTest, IndexAndShardsMustAgree) {
  write_shards();
  write_index(R"({"a":"model-00002-of-00002.safetensors","b":"model-00001-of-00002.safetensors"})");
  EXPECT_THAT(message(), HasSubstr("the index puts tensor \"a\" into model-00002"));
  write_index(R"({"a":"model-00001-of-00002.safetensors","c":"model-00002-of-00002.safetensors"})");
  EXPECT_THAT(message(), HasSubstr("the index puts tensor \"c\" into model-00002"));
  write(kFirst, {{"a", {.shape = {1}}}, {"stray", {.shape = {1}}}});
  write_index(R"({"a":"model-00001-of-00002.safetensors"})");
  EXPECT_THAT(message(), HasSubstr("tensor \"stray\" of model-00001-of-00002.safetensors is not"));
  write(kSecond, {{"a", {.shape = {1}}}, {"b", {.shape = {1}}}});
  write(kFirst, {{"a", {.shape = {1}}}});
  write_index(R"({"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"})");
  EXPECT_THAT(message(), HasSubstr("tensor \"a\" is in model-00001"));
}

TEST_F(CheckpointTest, ShardNamesStayInTheFolder) {
  write_shards();
  for (const char* name :
       {"../other.safetensors", "sub/x.safetensors", "/etc/x.safetensors", "..", "", "x.bin",
        "a\\\\b.safetensors", ".x.safetensors", "x\\u0000.safetensors"}) {
    write_index(std::string(R"({"a":")") + name + "\"}");
    EXPECT_THAT(message(), HasSubstr("expected the plain name of a .safetensors file")) << name;
  }
  write_index(R"({"a":7})");
  EXPECT_THAT(message(), HasSubstr("tensor \"a\" is in 7, expected the plain name"));
}

TEST_F(CheckpointTest, ShardsMayNotBeLinksOutOfTheFolder) {
  const TemporaryFolder outside;
  write_file(outside / "secret.safetensors", safetensors_bytes({{"a", {.shape = {1}}}}));
  fs::create_symlink(outside / "secret.safetensors", folder_ / "x.safetensors");
  write_index(R"({"a":"x.safetensors"})");
  EXPECT_THAT(message(), HasSubstr("the shard x.safetensors is a link that leaves the folder"));
  fs::remove(folder_ / "x.safetensors");
  write("y.safetensors", {{"a", {.shape = {1}}}});
  fs::create_symlink("y.safetensors", folder_ / "x.safetensors");
  EXPECT_EQ(message(), "accepted") << "a link within the folder";
}

TEST_F(CheckpointTest, HubCacheLinksToItsBlobs) {
  fs::create_directories(folder_ / "blobs");
  fs::create_directories(folder_ / "snapshots/main");
  write("blobs/0123", {{"a", {.shape = {1}}}});
  fs::create_symlink("../../blobs/0123", folder_ / "snapshots/main/x.safetensors");
  write_file(folder_ / "snapshots/main/model.safetensors.index.json",
             R"({"weight_map":{"a":"x.safetensors"}})");
  const auto source = open_checkpoint(folder_ / "snapshots/main");
  EXPECT_TRUE(source.ok()) << source.status().message();
}

TEST_F(CheckpointTest, MissingShard) {
  write_index(R"({"a":"model-00001-of-00002.safetensors"})");
  EXPECT_THAT(message(), AllOf(HasSubstr("model-00001-of-00002.safetensors, which is not there"),
                               HasSubstr("download complete")));
}

TEST_F(CheckpointTest, BadIndex) {
  write_file(folder_ / "model.safetensors.index.json", "{\"metadata\":{}}");
  EXPECT_THAT(message(), HasSubstr("no weight_map, expected an object of file names"));
  write_index("[]");
  EXPECT_THAT(message(), HasSubstr("no weight_map"));
  write_index("{}");
  EXPECT_THAT(message(), HasSubstr("no weight_map"));
  write_file(folder_ / "model.safetensors.index.json", "not json");
  EXPECT_THAT(message(), HasSubstr("not valid JSON"));
}

TEST_F(CheckpointTest, FoldersWithoutSafetensors) {
  EXPECT_THAT(message(), HasSubstr("neither model.safetensors nor model.safetensors.index.json"));
  write_file(folder_ / "pytorch_model.bin", "x");
  EXPECT_THAT(message(), AllOf(HasSubstr("the weights are in pytorch_model.bin"),
                               HasSubstr("safe_serialization=True")));
}

TEST_F(CheckpointTest, PointersOfGitLfsAreNoFiles) {
  write("model.safetensors", {{"a", {.shape = {1}}}});
  write_file(folder_ / "tokenizer.model",
             "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n");
  EXPECT_THAT(message(),
              AllOf(HasSubstr((folder_ / "tokenizer.model").string()), HasSubstr("git lfs pull")));
  write_file(folder_ / "tokenizer.model", "version");
  EXPECT_EQ(message(), "accepted");
}

TEST(CheckpointFolder, OtherThingsThanFolders) {
  EXPECT_THAT(open_checkpoint("openbmb/MiniCPM4.1-8B").status().message(),
              HasSubstr("hf download openbmb/MiniCPM4.1-8B --local-dir MiniCPM4.1-8B"));
  for (const char* path : {"./no/such", "no-such-folder", "/no/such", "a/b/c", "a /b"}) {
    EXPECT_THAT(open_checkpoint(path).status().message(),
                AllOf(HasSubstr(path), ::testing::Not(HasSubstr("hf download"))));
  }
}

}  // namespace
}  // namespace infllm::model
