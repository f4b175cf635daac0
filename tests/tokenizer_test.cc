// SPDX-License-Identifier: Apache-2.0
//
// Tokenizers against the PyPI packages `tokenizers` and `sentencepiece`, by golden files that
// tools/make_text_golden.py writes: per tokenizer 20,000 strings, a hash of their ids and of the
// texts.
#include "infllm/engine/tokenizer.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "infllm/engine/text_file.h"
#include "infllm/engine/tokenizer_files.h"
#include "infllm/engine/utf8.h"
#include "tests/support/source_folder.h"
#include "tests/support/text_golden.h"

namespace infllm::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Json = nlohmann::json;
namespace fs = std::filesystem;

fs::path golden() { return infllm::testing::source_folder() / "tests/golden/text"; }

std::string read(const fs::path& path) {
  Result<std::string> text = read_text_file(path, std::size_t{64} << 20);
  EXPECT_TRUE(text.ok()) << text.status().message();
  return text.ok() ? *text : std::string();
}

// The reader's result for a golden folder, without what Tokenizer::load adds for a checkpoint.
Tokenizer open_golden(const std::string& name) {
  const fs::path folder = golden() / name;
  const bool json = fs::exists(folder / "tokenizer.json");
  Result<TokenizerSpec> spec = json ? read_tokenizer_json(read(folder / "tokenizer.json"))
                                    : read_tokenizer_model(read(folder / "tokenizer.model"));
  EXPECT_TRUE(spec.ok()) << spec.status().message();
  return Tokenizer::create(std::move(spec).value()).value();
}

class GoldenTokenizer : public ::testing::TestWithParam<const char*> {
 protected:
  // sentencepiece knows no special tokens in a text and adds no bos of its own.
  EncodeOptions options() const {
    const bool json = std::string(GetParam()).starts_with("json");
    return {.add_bos = json, .parse_special = json};
  }
};

TEST_P(GoldenTokenizer, EncodesAndDecodesAsTheOracle) {
  const Tokenizer tokenizer = open_golden(GetParam());
  const std::vector<std::string> atoms = test::read_atoms(golden() / "atoms.txt");
  const std::vector<std::uint32_t> ids_hash = test::read_hashes(golden() / GetParam() / "ids.txt");
  const std::vector<std::uint32_t> text_hash =
      test::read_hashes(golden() / GetParam() / "texts.txt");
  std::istringstream allowed_file(read(golden() / GetParam() / "random_ids.txt"));
  const std::vector<std::int32_t> allowed((std::istream_iterator<std::int32_t>(allowed_file)), {});
  ASSERT_GE(ids_hash.size(), 20'000u);
  ASSERT_GT(text_hash.size() * 8, ids_hash.size());
  ASSERT_FALSE(allowed.empty());
  std::vector<bool> is_allowed(tokenizer.vocab_size());
  for (const std::int32_t id : allowed) is_allowed[id] = true;

  std::string texts;
  for (std::size_t i = 0; i < text_hash.size() * 8; ++i) {
    std::vector<std::int32_t> ids;
    if (i < ids_hash.size()) {
      const std::string text = test::string_of(i, atoms);
      ids = tokenizer.encode(text, options());
      ASSERT_EQ(test::hash_ids(ids), ids_hash[i])
          << "string " << i << ": " << Json(utf8_repair(text, Utf8Repair::kPerByte)).dump() << "\n"
          << ::testing::PrintToString(ids);
      std::erase_if(ids, [&](std::int32_t id) { return !is_allowed[id]; });
    } else {
      test::SplitMix random(i - ids_hash.size());
      ids.resize(random.below(20));
      for (std::int32_t& id : ids) id = allowed[random.below(allowed.size())];
    }
    texts += tokenizer.decode(ids) + '\0';
    if (i % 8 != 7) continue;
    ASSERT_EQ(test::hash_bytes(texts), text_hash[i / 8]) << "the texts up to " << i << ":\n"
                                                         << texts;
    texts.clear();
  }
}

TEST_P(GoldenTokenizer, SamplesInFull) {
  const Tokenizer tokenizer = open_golden(GetParam());
  for (const Json& sample : Json::parse(read(golden() / GetParam() / "samples.json"))) {
    const std::string text = test::from_hex(sample["string"].get<std::string>());
    EXPECT_EQ(tokenizer.encode(text, options()), sample["ids"].get<std::vector<std::int32_t>>())
        << text;
  }
}

TEST_P(GoldenTokenizer, StreamIsDecodeInPieces) {
  const Tokenizer tokenizer = open_golden(GetParam());
  for (std::uint64_t seed = 0; seed < 3000; ++seed) {
    test::SplitMix random(seed);
    std::vector<std::int32_t> ids(random.below(12));
    for (std::int32_t& id : ids) {
      id = static_cast<std::int32_t>(random.below(tokenizer.vocab_size() + 2)) - 1;
    }
    const bool skip = random.below(2) == 0;
    TokenDecoder decoder(tokenizer, skip);
    for (int round = 0; round < 2; ++round) {  // finish() leaves it as new
      std::string text;
      for (const std::int32_t id : ids) {
        const std::string piece = decoder.push(id);
        EXPECT_TRUE(utf8_valid(piece));
        text += piece;
      }
      text += decoder.finish();
      ASSERT_EQ(text, tokenizer.decode(ids, skip)) << ::testing::PrintToString(ids);
    }
  }
}

TEST_P(GoldenTokenizer, OneMegabyteOfOneWordTakesLessThanASecond) {
  const Tokenizer tokenizer = open_golden(GetParam());
  const std::vector<std::string> units = {
      "a", "ab", "1", "=", "\xE4\xBD\xA0", "x", "\xF0\x9F\x98\x80"};
  for (const std::string& unit : units) {
    std::string text;
    while (text.size() < (1u << 20)) text += unit;
    const auto start = std::chrono::steady_clock::now();
    const std::vector<std::int32_t> ids = tokenizer.encode(text, options());
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    EXPECT_FALSE(ids.empty());
#if defined(NDEBUG) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    EXPECT_LT(took.count(), 1.0) << unit;
#endif
  }
}

INSTANTIATE_TEST_SUITE_P(All, GoldenTokenizer,
                         ::testing::Values("spm_llama", "spm_bare", "spm_nfkc", "json_llama",
                                           "json_llama_first", "json_metaspace", "json_llama3",
                                           "json_qwen2", "json_gpt2"),
                         [](const auto& name) { return name.param; });

TEST(Tokenizer, SpecialTokensAreTextUnlessAskedFor) {
  const Tokenizer tokenizer = open_golden("json_llama");
  const std::int32_t start = tokenizer.id_of("<|im_start|>");
  ASSERT_GE(start, 0);
  EXPECT_TRUE(tokenizer.is_special(start));
  EXPECT_EQ(tokenizer.piece(start), "<|im_start|>");
  const auto parsed = tokenizer.encode("<|im_start|>", {.add_bos = false, .parse_special = true});
  EXPECT_THAT(parsed, ElementsAre(start));
  const auto plain = tokenizer.encode("<|im_start|>", {.add_bos = false, .parse_special = false});
  EXPECT_GT(plain.size(), 1u);
  EXPECT_EQ(tokenizer.decode(plain), "<|im_start|>");
  EXPECT_EQ(tokenizer.decode(parsed), "");
  EXPECT_EQ(tokenizer.decode(parsed, /*skip_special=*/false), "<|im_start|>");
}

TEST(Tokenizer, StrayBytesBecomeReplacementCharactersOneByOne) {
  const Tokenizer tokenizer = open_golden("json_llama");
  const auto byte = [&](int b) { return tokenizer.id_of(fmt::format("<0x{:02X}>", b)); };
  // An e with acute, half of a euro sign, an a.
  const std::vector<std::int32_t> ids = {byte(0xC3), byte(0xA9), byte(0xE2), byte(0x82), byte('a')};
  EXPECT_EQ(tokenizer.decode(ids), "\xC3\xA9\xEF\xBF\xBD\xEF\xBF\xBD\x61");
  TokenDecoder decoder(tokenizer);
  EXPECT_EQ(decoder.push(ids[0]), "");
  EXPECT_EQ(decoder.push(ids[1]), "\xC3\xA9");
  EXPECT_EQ(decoder.push(ids[2]), "");
  EXPECT_EQ(decoder.push(ids[3]), "");
  EXPECT_EQ(decoder.push(ids[4]), "\xEF\xBF\xBD\xEF\xBF\xBD\x61");
}

// ---- checkpoint folders

class Checkpoint : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / fmt::format("infllm_tokenizer_test_{}", getpid());
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  void write(const std::string& name, const std::string& text) {
    std::ofstream(folder_ / name, std::ios::binary) << text;
  }
  void copy(const std::string& golden_name, const std::string& file) {
    fs::copy_file(golden() / golden_name / file, folder_ / file);
  }
  std::string message() const { return Tokenizer::load(folder_).status().message(); }
  fs::path folder_;
};

TEST_F(Checkpoint, EosIdsTemplatesAndBosComeFromTheirFiles) {
  copy("json_llama", "tokenizer.json");
  write("tokenizer_config.json", R"({"add_bos_token": false, "bos_token": "<s>",
    "eos_token": {"content": "</s>"}, "chat_template": [{"name": "default", "template": "A"},
    {"name": "tool_use", "template": "B"}], "added_tokens_decoder":
    {"1411": {"content": "<late>", "special": true}}})");
  write("generation_config.json", R"({"eos_token_id": [2, 1400]})");
  const Result<Tokenizer> tokenizer = Tokenizer::load(folder_);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  EXPECT_EQ(tokenizer->bos_id(), 1);
  EXPECT_THAT(tokenizer->eos_ids(), ElementsAre(2, 1400));
  EXPECT_THAT(tokenizer->encode("<late>", {}), ElementsAre(1411));
  EXPECT_EQ(tokenizer->vocab_size(), 1412);
  EXPECT_EQ(tokenizer->chat_templates().at("tool_use"), "B");
  EXPECT_EQ(tokenizer->special_tokens().at("eos_token"), "</s>");
  write("chat_template.jinja", "C");
  EXPECT_EQ(Tokenizer::load(folder_)->chat_templates().at("default"), "C");
}

TEST_F(Checkpoint, ModelFileAloneAddsBosAndKnowsItsControlTokens) {
  copy("spm_llama", "tokenizer.model");
  const Result<Tokenizer> tokenizer = Tokenizer::load(folder_);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  EXPECT_EQ(tokenizer->encode("the</s>", {}).front(), 1);
  EXPECT_EQ(tokenizer->encode("the</s>", {}).back(), 2);
  EXPECT_EQ(tokenizer->encode("", {}).size(), 1u);
  EXPECT_THAT(tokenizer->eos_ids(), ElementsAre(2));
}

TEST_F(Checkpoint, LegacyDecidesWhereTheDummyPrefixGoes) {
  copy("spm_llama", "tokenizer.model");
  const auto count_spaces = [&] {
    const Tokenizer tokenizer = Tokenizer::load(folder_).value();
    const auto ids = tokenizer.encode("a</s>b", {});
    int count = 0;
    for (const std::int32_t id : ids) count += tokenizer.piece(id).starts_with(kSpaceMarker);
    return count;
  };
  EXPECT_EQ(count_spaces(), 2);
  write("tokenizer_config.json", R"({"legacy": false})");
  EXPECT_EQ(count_spaces(), 1);
}

TEST_F(Checkpoint, MessagesNameTheFileAndTheProblem) {
  EXPECT_THAT(message(), HasSubstr("neither tokenizer.json nor tokenizer.model"));
  write("tokenizer.model", "not a model");
  EXPECT_THAT(message(), HasSubstr("tokenizer.model: not a SentencePiece model"));
  write("tokenizer.json", "{\"model\": {\"type\": \"Unigram\"}}");
  EXPECT_THAT(message(), HasSubstr("model type \"Unigram\", expected \"BPE\""));
  fs::remove(folder_ / "tokenizer.json");
  fs::remove(folder_ / "tokenizer.model");
  copy("json_llama", "tokenizer.json");
  write("generation_config.json", R"({"eos_token_id": 99999})");
  EXPECT_THAT(message(), HasSubstr("eos_token_id 99999 is not below"));
  write("generation_config.json", R"({"eos_token_id": -1})");
  EXPECT_THAT(message(), HasSubstr("generation_config.json: eos_token_id: expected an id"));
  write("generation_config.json", "{}");
  write("tokenizer_config.json", R"({"added_tokens_decoder": {"5": {"content": "x"}}})");
  EXPECT_THAT(message(), HasSubstr("id 5 is both"));
  write("tokenizer_config.json", "[1");
  EXPECT_THAT(message(), HasSubstr("tokenizer_config.json: not valid JSON"));
}

// ---- files that must be refused, each with the reason

struct BadJson {
  const char* pointer;  // what to change in a good file
  const char* value;
  const char* message;
};

TEST(TokenizerJson, RefusesWhatItCannotReproduce) {
  const Json good = Json::parse(read(golden() / "json_llama3/tokenizer.json"));
  const BadJson cases[] = {
      {"/model/type", R"("WordPiece")", "model type \"WordPiece\""},
      {"/model/dropout", "0.1", "makes encoding random"},
      {"/model/end_of_word_suffix", R"("</w>")", "end_of_word_suffix"},
      {"/model/vocab", "{}", "model.vocab is missing, empty"},
      {"/model/vocab/!", "-1", "expected an id from 0"},
      {"/model/vocab/!", "1000000", "expected an id from 0"},
      {"/model/vocab/!", "7", "id 7 is both"},
      {"/model/vocab/!", "999999", "id 999999 is far beyond the other"},
      {"/model/merges/0", R"("a b c")", "merge 0 is neither"},
      {"/model/merges/0", R"(["zz", "a"])", "the vocabulary lacks the first"},
      {"/model/merges/0", R"(["a", "zz"])", "the vocabulary lacks the second"},
      {"/model/merges/0", R"(["!", "a"])", "the vocabulary lacks the result"},
      {"/model/unk_token", R"("<none>")", "unk_token \"<none>\" is not in the vocabulary"},
      {"/normalizer", R"({"type": "NFC"})", "\"NFC\" is not supported"},
      {"/normalizer", R"({"type": "Replace", "pattern": {"Regex": "a"}, "content": ""})", "String"},
      {"/pre_tokenizer", R"({"type": "Digits"})", "\"Digits\" is not supported"},
      {"/pre_tokenizer/pretokenizers/0/pattern/Regex", R"("\\w+")", "Split by \"\\w+\""},
      {"/pre_tokenizer/pretokenizers/0/behavior", R"("Removed")", "(Removed)"},
      {"/pre_tokenizer", R"({"type": "Metaspace", "replacement": "_"})", "expected U+2581"},
      {"/pre_tokenizer", R"({"type": "Metaspace", "prepend_scheme": "last"})", "prepend_scheme"},
      {"/decoder", "null", "decoder: none"},
      {"/decoder", R"({"type": "WordPiece"})", "\"WordPiece\" is not supported"},
      {"/decoder",
       R"({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]})",
       "\"ByteFallback\" is not supported"},
      {"/post_processor", R"({"type": "BertProcessing"})", "\"BertProcessing\""},
      {"/added_tokens/0/id", "5", "has id 5, but the vocabulary says"},
      {"/added_tokens/0/content", R"("")", "an added token without \"content\""},
      {"/added_tokens/0/special", "1", "expected true or false"},
  };
  ASSERT_TRUE(read_tokenizer_json(good.dump()).ok());
  for (const BadJson& bad : cases) {
    Json file = good;
    if (std::string(bad.pointer) == "/added_tokens/0/id") file["model"]["vocab"]["<s>"] = 4000;
    file[Json::json_pointer(bad.pointer)] = Json::parse(bad.value);
    const Result<TokenizerSpec> spec = read_tokenizer_json(file.dump());
    ASSERT_FALSE(spec.ok()) << bad.pointer << " = " << bad.value;
    EXPECT_THAT(spec.status().message(), HasSubstr(bad.message)) << bad.pointer;
    EXPECT_THAT(spec.status().message(), HasSubstr("tokenizer.json: "));
  }
}

TEST(TokenizerModel, RefusesEveryTruncation) {
  const std::string good = read(golden() / "spm_nfkc/tokenizer.model");
  ASSERT_TRUE(read_tokenizer_model(good).ok());
  // A cut between two fields of the outer message may leave a valid but smaller model, which has no
  // trainer_spec and so counts as unigram; no cut passes, none crashes.
  for (std::size_t size = 0; size < good.size(); size += 1 + size / 64) {
    EXPECT_FALSE(read_tokenizer_model(std::string_view(good).substr(0, size)).ok()) << size;
  }
}

TEST(TokenizerModel, MessagesSayWhatIsWrong) {
  const std::string good = read(golden() / "spm_llama/tokenizer.model");
  const auto message = [&](const std::string& more) {
    return read_tokenizer_model(good + more).status().message();
  };
  const auto field = [](int number, const std::string& bytes) {
    return std::string{static_cast<char>(number * 8 + 2), static_cast<char>(bytes.size())} + bytes;
  };
  using std::string_literals::operator""s;
  EXPECT_THAT(message(field(1, "\x0A\x03<s>")), HasSubstr("appears twice"));
  EXPECT_THAT(message(field(1, "\x0A\x01\xFF")), HasSubstr("expected 1 to 256 bytes of UTF-8"));
  EXPECT_THAT(message(field(1, "")), HasSubstr("expected 1 to 256 bytes of UTF-8"));
  EXPECT_THAT(message(field(1, "\x0A\x02zz\x18\x02")), HasSubstr("2 unknown pieces"));
  EXPECT_THAT(message(field(1, "\x0A\x02zz\x18\x09")), HasSubstr("has type 9"));
  EXPECT_THAT(message(field(1, "\x0A\x02zz\x18\x06")), HasSubstr("257 byte pieces"));
  EXPECT_THAT(message(field(1, "\x0A\x02zz\x15\x00\x00\xC0\x7F"s)), HasSubstr("not finite"));
  EXPECT_THAT(message(field(2, "\x18\x01")), HasSubstr("model type 1, expected 2 (BPE)"));
  EXPECT_THAT(message(field(2, "\xC0\x01\x01")), HasSubstr("treat_whitespace_as_suffix"));
  EXPECT_THAT(message(field(5, "\x12\x04zzzz")), HasSubstr("denormalizer"));
  EXPECT_THAT(message("\x0A\x7F"), HasSubstr("a length beyond the end"));
  EXPECT_THAT(message("\x0B"), HasSubstr("wire type 3"));
  EXPECT_EQ(message(field(9, "unknown fields are skipped")), "");
  // A character map is checked when the tokenizer is made.
  const Result<TokenizerSpec> spec = read_tokenizer_model(good + field(3, "\x12\x04zzzz"));
  ASSERT_TRUE(spec.ok());
  EXPECT_THAT(Tokenizer::create(*spec).status().message(), HasSubstr("precompiled_charsmap"));
}

}  // namespace
}  // namespace infllm::engine
