// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "infllm/engine/stop_strings.h"
#include "infllm/engine/utf8.h"
#include "tests/support/text_golden.h"

namespace infllm::engine {
namespace {

using ::testing::HasSubstr;

std::int32_t one(const SamplingParams& params, std::span<const float> logits,
                 std::size_t position = 0) {
  static std::vector<std::int32_t> tokens;
  tokens.resize(std::max(tokens.size(), position));
  Sampler sampler(params);
  return sampler.sample(logits, std::span(tokens).first(position), 0).value();
}

// The definition of the header with a full sort, as a distribution over tokens.
std::vector<double> distribution(const SamplingParams& p, const std::vector<float>& logits) {
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  if (p.top_k > 0) order.resize(std::min<std::size_t>(order.size(), p.top_k));
  std::vector<double> weight(logits.size());
  double total = 0;
  for (const int i : order) {
    total += weight[i] = std::exp((double{logits[i]} - logits[order[0]]) / p.temperature);
  }
  double before = 0, kept = 0;
  for (const int i : order) {
    const double w = weight[i];
    if ((p.top_p < 1 && before >= p.top_p * total) || w < p.min_p) weight[i] = 0;
    before += w;
    kept += weight[i];
  }
  for (double& w : weight) w /= kept;
  return weight;
}

TEST(Philox, KnownAnswers) {
  // Test vectors that come with the authors' Random123 library.
  using Words = std::array<std::uint32_t, 4>;
  EXPECT_EQ(philox({0, 0, 0, 0}, {0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const std::uint32_t f = 0xffffffff;
  EXPECT_EQ(philox({f, f, f, f}, {f, f}), (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Sampler, GreedyTakesTheLargestAndOfEqualsTheSmallestId) {
  EXPECT_EQ(one({.temperature = 0}, std::vector<float>{1, 3, 2, 3}), 1);
  EXPECT_EQ(one({.temperature = 0}, std::vector<float>{-INFINITY, -5, -INFINITY}), 1);
  // -0 and 0 are equal.
  EXPECT_EQ(one({.temperature = 0}, std::vector<float>{-0.0f, 0.0f}), 0);
}

TEST(Sampler, DrawsFromTheDistributionOfTheHeader) {
  test::SplitMix random(1);
  constexpr int kDraws = 20'000;
  for (int round = 0; round < 24; ++round) {
    std::vector<float> logits(1 + random.below(200));
    // Few distinct values, so that ties are common.
    for (float& l : logits) l = static_cast<float>(random.below(24)) / 4.0f;
    SamplingParams p{
        .temperature = 0.25f + 0.25f * static_cast<float>(random.below(6)),
        .top_k = static_cast<std::int32_t>(random.below(2) * random.below(40)),
        .top_p = random.below(2) ? 1.0f : 0.1f + 0.1f * static_cast<float>(random.below(9)),
        .min_p = random.below(2) ? 0.0f : 0.05f * static_cast<float>(random.below(10)),
        .seed = random.next()};
    const std::vector<double> want = distribution(p, logits);
    std::vector<int> got(logits.size());
    for (int i = 0; i < kDraws; ++i) ++got[one(p, logits, i)];
    for (std::size_t i = 0; i < logits.size(); ++i) {
      if (want[i] == 0) {
        EXPECT_EQ(got[i], 0) << "round " << round << " token " << i;
        continue;
      }
      // Six standard deviations of a binomial count: exceeded once in 500 million.
      const double sigma = std::sqrt(kDraws * want[i] * (1 - want[i]));
      EXPECT_NEAR(got[i], kDraws * want[i], 6 * sigma + 1) << "round " << round << " token " << i;
    }
  }
}

TEST(Sampler, TopPTakesTheTokenThatReachesIt) {
  // Probabilities 1/2, 1/4, 1/8, 1/8: exact in binary.
  const float half = std::log(2.0f);
  const std::vector<float> logits = {3 * half, 2 * half, half, half};
  const auto support = [&](float top_p) {
    std::vector<bool> seen(4);
    for (int i = 0; i < 2000; ++i) seen[one({.top_p = top_p}, logits, i)] = true;
    return std::count(seen.begin(), seen.end(), true);
  };
  EXPECT_EQ(support(0.01f), 1);
  EXPECT_EQ(support(0.49f), 1);
  EXPECT_EQ(support(0.6f), 2);
  EXPECT_EQ(support(0.8f), 3);
  EXPECT_EQ(support(0.99f), 4);
}

TEST(Sampler, DependsOnSeedAndPositionOnly) {
  std::vector<float> logits(1000);
  test::SplitMix random(3);
  for (float& l : logits) l = static_cast<float>(random.below(1000)) / 200.0f;
  Sampler together({.seed = 7});
  std::map<std::int32_t, int> tokens;
  std::vector<std::int32_t> answer;
  for (int i = 0; i < 300; ++i) {
    const std::int32_t token = together.sample(logits, answer, 0).value();
    EXPECT_EQ(one({.seed = 7}, logits, answer.size()), token);  // no step before it
    answer.push_back(token);
    ++tokens[token];
  }
  EXPECT_GT(tokens.size(), 100u);
  int differ = 0;
  for (std::size_t position = 0; position < 300; ++position) {
    differ += one({.seed = 7}, logits, position) != one({.seed = 8}, logits, position);
  }
  EXPECT_GT(differ, 200);
}

TEST(Sampler, PenaltiesFollowTheirConventions) {
  const auto next = [](const SamplingParams& params, std::vector<float> logits,
                       std::vector<std::int32_t> tokens) {
    Sampler sampler(params);
    return sampler.sample(logits, tokens, /*prompt_tokens=*/2).value();
  };
  // Repetition: the prompt counts; a positive logit is divided, a negative one multiplied.
  const SamplingParams repetition{.temperature = 0, .repetition_penalty = 2};
  EXPECT_EQ(next(repetition, {3, 1.6f}, {0, 0}), 1);
  EXPECT_EQ(next(repetition, {3, 1.4f}, {0, 0}), 0);
  EXPECT_EQ(next(repetition, {-1, -1.9f}, {0, 0}), 1);
  EXPECT_EQ(next(repetition, {-1, -2.1f}, {0, 0}), 0);
  // Presence and frequency: the answer alone counts.
  const SamplingParams openai{
      .temperature = 0, .presence_penalty = 1.0f, .frequency_penalty = 0.5f};
  EXPECT_EQ(next(openai, {2.2f, 0}, {0, 0}), 0);           // 2.2
  EXPECT_EQ(next(openai, {2.2f, 0}, {0, 0, 0, 0}), 0);     // 2.2 - 1 - 1.0
  EXPECT_EQ(next(openai, {2.2f, 0}, {0, 0, 0, 0, 0}), 1);  // 2.2 - 1 - 1.5
  // Ids beyond the logits are ignored.
  EXPECT_EQ(next(openai, {1, 0}, {0, 0, 7, -1}), 0);
}

TEST(Sampler, BrokenLogitsAreAnErrorAndMinusInfinityForbids) {
  Sampler sampler({});
  const auto message = [&](std::vector<float> logits) {
    return sampler.sample(logits, {}, 0).status().message();
  };
  EXPECT_THAT(message({0, NAN}), HasSubstr("the logit of token 1 is nan"));
  EXPECT_THAT(message({INFINITY, 0}), HasSubstr("the logit of token 0 is inf"));
  EXPECT_THAT(message({-INFINITY, -INFINITY}), HasSubstr("none of the 2 tokens is allowed"));
  EXPECT_THAT(message({}), HasSubstr("none of the 0 tokens is allowed"));
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(one({}, std::vector<float>{-INFINITY, 1, -INFINITY}, i), 1);
  }
  // The largest floats do not overflow on the way.
  EXPECT_EQ(one({.temperature = 0.01f}, std::vector<float>{-3e38f, 3e38f}), 1);
}

// What a backend's top_logits hands out, by sorting; weights in the order of a whole row's sampler.
TopLogits best_of(const std::vector<float>& logits, float temperature) {
  std::vector<std::int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::erase_if(order, [&](std::int32_t i) { return logits[i] == -INFINITY; });
  TopLogits best;
  std::ranges::stable_sort(order, std::greater(), [&](std::int32_t i) { return logits[i]; });
  best.count = std::min(static_cast<std::int32_t>(order.size()), TopLogits::kMost);
  for (std::int32_t i = 0; i < best.count; ++i) {
    best.token[i] = order[i];
    best.logit[i] = logits[order[i]];
  }
  std::ranges::sort(order);
  for (const std::int32_t i : order) {
    best.weight += std::exp((double{logits[i]} - best.logit[0]) / temperature);
  }
  return best;
}

TEST(Sampler, TheBestLogitsDecideLikeTheWholeRowOrNotAtAll) {
  test::SplitMix random(11);
  int decided = 0;
  int undecided = 0;
  for (int round = 0; round < 4000; ++round) {
    std::vector<float> logits(random.below(3) == 0 ? 1 + random.below(300) : 1000);
    const std::uint64_t levels = random.below(2) == 0 ? 24 : 100'000;  // ties, or none
    const float spread = random.below(2) == 0 ? 2.0f : 12.0f;
    for (float& l : logits) {
      l = spread * static_cast<float>(random.below(levels)) / static_cast<float>(levels);
      if (random.below(9) == 0) l = -INFINITY;
    }
    logits[0] = 0;
    const SamplingParams p{
        .temperature = 0.5f * static_cast<float>(random.below(4)),
        .top_k = static_cast<std::int32_t>(random.below(2) * random.below(600)),
        .top_p = random.below(2) ? 1.0f : 0.1f + 0.1f * static_cast<float>(random.below(9)),
        .min_p = random.below(2) ? 0.0f : 0.1f * static_cast<float>(random.below(10)),
        .repetition_penalty = random.below(8) == 0 ? 1.1f : 1.0f,
        .seed = random.next()};
    const std::vector<std::int32_t> tokens(random.below(50), 0);
    Sampler sampler(p);
    const auto short_way =
        sampler.sample(best_of(logits, std::max(p.temperature, 1e-3f)), tokens).value();
    (short_way ? decided : undecided) += 1;
    if (!short_way) continue;
    ASSERT_EQ(*short_way, sampler.sample(logits, tokens, 0).value()) << "round " << round;
  }
  EXPECT_GT(decided, 1000);
  EXPECT_GT(undecided, 200);

  Sampler sampler({});
  EXPECT_THAT(sampler.sample(TopLogits{.broken = 7}, {}).status().message(),
              HasSubstr("the logit of token 7 is no number or infinite"));
  EXPECT_THAT(sampler.sample(TopLogits{}, {}).status().message(),
              HasSubstr("none of the tokens is allowed"));
}

TEST(Sampler, ParametersAreChecked) {
  const auto message = [](const SamplingParams& p) { return check(p).message(); };
  EXPECT_EQ(message({}), "");
  EXPECT_EQ(message({.temperature = -1}),
            "temperature = -1, expected a value of at least 0 and at most 100");
  EXPECT_THAT(message({.temperature = NAN}), HasSubstr("temperature = nan"));
  EXPECT_THAT(message({.top_k = -1}), HasSubstr("top_k = -1, expected 0 (off) or more"));
  EXPECT_THAT(message({.top_p = 0}), HasSubstr("top_p = 0, expected a value above 0"));
  EXPECT_THAT(message({.top_p = 1.5f}), HasSubstr("at most 1"));
  EXPECT_THAT(message({.min_p = -0.1f}), HasSubstr("min_p"));
  EXPECT_THAT(message({.repetition_penalty = 0}), HasSubstr("repetition_penalty"));
  EXPECT_THAT(message({.presence_penalty = INFINITY}), HasSubstr("presence_penalty"));
  EXPECT_THAT(message({.frequency_penalty = -101}), HasSubstr("frequency_penalty"));
}

// ---- stop strings

// The whole text cut where the first stop string to be complete begins.
std::string cut(const std::string& text, const std::vector<std::string>& stops, bool& stopped) {
  for (std::size_t end = 1; end <= text.size(); ++end) {
    std::size_t longest = 0;
    for (const std::string& stop : stops) {
      if (std::string_view(text).substr(0, end).ends_with(stop)) {
        longest = std::max(longest, stop.size());
      }
    }
    stopped = longest > 0;
    if (stopped) return text.substr(0, end - longest);
  }
  return text;
}

TEST(StopStrings, AnyStreamShowsWhatTheWholeTextWouldShow) {
  int with_stop = 0;
  for (std::uint64_t seed = 0; seed < 20'000; ++seed) {
    test::SplitMix random(seed);
    const auto word = [&](std::uint64_t most) {
      std::string out(1 + random.below(most), 'a');
      for (char& c : out) c = static_cast<char>('a' + random.below(2));
      return out;
    };
    std::vector<std::string> stops(random.below(4));
    for (std::string& stop : stops) stop = word(5);
    const std::string text = word(30);
    bool want_stop = false;
    const std::string want = cut(text, stops, want_stop);

    StopStrings stream(stops);
    std::string shown;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t size = 1 + random.below(6);
      shown += stream.push(std::string_view(text).substr(at, size));
      ASSERT_TRUE(want.starts_with(shown)) << text;
      at += size;
    }
    shown += stream.finish();
    ASSERT_EQ(shown, want) << text;
    ASSERT_EQ(stream.stopped(), want_stop);
    with_stop += want_stop;
  }
  EXPECT_GT(with_stop, 5000);
  EXPECT_LT(with_stop, 19'000);
}

TEST(StopStrings, HoldsBackNoMoreThanNeeded) {
  StopStrings stops({"\nUser:", "###"});
  EXPECT_EQ(stops.push("Well.\nUs"), "Well.");
  EXPECT_EQ(stops.push("ual #"), "\nUsual ");
  EXPECT_EQ(stops.push("## and more"), "");
  EXPECT_TRUE(stops.stopped());
  EXPECT_EQ(stops.found(), "###");
  EXPECT_EQ(stops.push("ignored"), "");
  EXPECT_EQ(stops.finish(), "");
}

TEST(StopStrings, ListsAreChecked) {
  EXPECT_THAT(StopStrings::check({""}).message(), HasSubstr("a stop string of 0 bytes"));
  EXPECT_THAT(StopStrings::check({std::string(1025, 'x')}).message(), HasSubstr("1 to 1024"));
  EXPECT_THAT(StopStrings::check(std::vector<std::string>(17, "x")).message(),
              HasSubstr("17 stop strings, expected at most 16"));
}

}  // namespace
}  // namespace infllm::engine
