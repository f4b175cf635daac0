// SPDX-License-Identifier: Apache-2.0
//
// Written by hand, because forty options one below the other help nobody: one screen a command,
// examples first.
#include "infllm/app/cli.h"

namespace infllm::app {
namespace {

constexpr char kOverview[] =
    R"(infllm: long documents on a CPU or a GPU, with attention that is dense on short inputs and sparse on long ones

  infllm run MODEL "Why is the sky blue?"                      one answer
  infllm run MODEL --document book.txt --question "Who ...?"   a question about a document
  infllm chat MODEL                                            a conversation
  infllm bench MODEL -p 512,4096 -n 64                         tokens per second, dense and sparse
  infllm inspect MODEL                                         what a checkpoint is and needs
  infllm tokenize MODEL "some text"                            token ids
  infllm eval MODEL samples.jsonl                              score answers about documents

MODEL is a folder in Hugging Face's layout: config.json, safetensors, tokenizer files.
`infllm COMMAND --help` shows a command's options, `infllm --version` the version.
Options can come from the environment (INFLLM_DEVICE, INFLLM_THREADS, ...) or, in front of the command,
from `--config FILE` (TOML or INI, a section per command). The command line wins.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
)";

constexpr char kModelHelp[] = R"(Model and device
  -m, --model DIR          the checkpoint folder, when it is not the first argument
  --device NAME            auto, cuda, cuda:1, cpu, cpu:avx2, ..., reference (default auto)
  -t, --threads N          0: one per hardware thread (default)
  --dtype TYPE             weights: auto, float32, bfloat16, int8, int8:GROUP
  --kv-dtype TYPE          cache: auto, float32, bfloat16
  --chunk-size N           prompt tokens computed at once (default 512, on a GPU 8192)
)";

constexpr char kContextHelp[] =
    R"(  -c, --ctx-size N         tokens of prompt and answer together (default: the model's)
)";

constexpr char kVerboseHelp[] =
    R"(  -v, --verbose            print the values in effect
)";

constexpr char kSparseHelp[] =
    R"(Sparse attention (also --sparse-switch, --sparse-topk-k, --sink-window-size, --use-compress-lse)
  --sparse auto|on|off     as the checkpoint says, also without its consent, never
  --dense-len N            sparse from N tokens on; -1 always
  --topk N  --window-size TOKENS  --block-window-size BLOCKS  --init-blocks N
  --kernel-size N  --kernel-stride N  --block-size N  --lse coarse|fine  --use-nope  --legacy-window
)";

constexpr char kSamplingHelp[] =
    R"(Sampling (defaults from generation_config.json; --temp 0 is greedy)
  --temp T  --top-k N  --top-p P  --min-p P  -s, --seed N
  --repeat-penalty F  --presence-penalty F  --frequency-penalty F
  -n, --max-tokens N       end the answer after N tokens (default: no limit but the context)
  --stop TEXT              end the answer before TEXT; may be given several times
  --ignore-eos             do not stop where the model wants to
)";

constexpr char kRunHelp[] =
    R"(infllm run MODEL [PROMPT]: answer one prompt; the answer alone goes to stdout

  infllm run models/needle-32k --document report.txt --question "What is the pass code of grey fox?"
  infllm run MODEL -f prompt.txt --temp 0 -n 200
  echo "Why is the sky blue?" | infllm run MODEL -
  infllm run MODEL --no-chat "Once upon a time"

Prompt
  PROMPT                   text, or - for stdin (also when nothing is given)
  -f, --file FILE          read the prompt from a file
  --document FILE --question TEXT   ask about a document
  --system TEXT            system message
  --enable-thinking, --no-thinking  the chat template's switch
  --no-chat                no template: continue the text
  --json                   one JSON object on stdout: text, tokens, times, attention
  --no-perf                no timing lines on stderr
)";

constexpr char kChatHelp[] =
    R"(infllm chat MODEL: a conversation; Ctrl-C stops the answer, a second Ctrl-C leaves

  infllm chat MODEL --system "Answer in one sentence."

  --system TEXT            system message
  --enable-thinking, --no-thinking  the chat template's switch
In the conversation: /clear forgets it, /exit leaves, /help shows the commands. With -v, each answer's
times follow it.

)";

constexpr char kBenchHelp[] =
    R"(infllm bench MODEL: tokens per second with dense and with sparse attention, side by side

  infllm bench MODEL -p 512,8192,32768 -n 64 -d 0,32768
  infllm bench --synthetic minicpm4-0.5b -p 4096 -n 32 -r 3 -o json

  -p, --n-prompt N,...     prompt lengths, rows pp512 (default 512; 0: none)
  -n, --n-gen N,...        generated tokens, rows tg128 (default 128; 0: none)
  -d, --n-depth N,...      tokens in the cache before the measurement (default 0)
  -r, --repetitions N      default 5; rows show mean and standard deviation
  --attention LIST         columns: dense,sparse (default both)
  -o, --output FORMAT      md, csv, json, jsonl
  --jsonl FILE             append benchmark records as well
  --synthetic SHAPE        generated weights: minicpm4-0.5b, minicpm4-8b, minicpm4.1-8b, bitcpm4-1b
  --repeat N               each made-up token N times in a row (default 1: every neighbour another
                           one, which no text has); neighbours then select nearly the same blocks
  --fill                   make up the keys and values of -d instead of computing them, which takes a
                           minute for a million tokens of an 8B model; -n is as fast behind either
  --no-warmup              measure from the first run
  --no-steps               on a GPU: without the further run that tells the time of each step

)";

constexpr char kInspectHelp[] =
    R"(infllm inspect MODEL: what the checkpoint is, what attention will do, what memory it takes

  infllm inspect MODEL
  infllm inspect --synthetic minicpm4-8b --lengths 32768,131072

  -l, --lengths N,...      lengths at which to state memory
  --synthetic SHAPE        a named shape instead of a checkpoint
  --json                   one JSON object on stdout

)";

constexpr char kTokenizeHelp[] =
    R"(infllm tokenize MODEL [TEXT]: token ids of a text, or the text of ids

  infllm tokenize MODEL "Hello"
  infllm tokenize MODEL -f book.txt --count
  echo "1 25 613" | infllm tokenize MODEL --decode

  TEXT                     text, or - for stdin (also when nothing is given)
  -f, --file FILE          read the text from a file
  --decode                 the input is ids, separated by spaces or commas
  --count                  only how many
  --no-special             no BOS, and control tokens in the text are plain text
  --json                   one JSON object on stdout: ids and pieces
)";

constexpr char kEvalHelp[] =
    R"(infllm eval MODEL SAMPLES: score greedy answers about documents, by exact match

  infllm eval models/needle-32k heldout.jsonl --attention dense,sparse --jsonl results.jsonl

SAMPLES has one JSON object a line:
  {"id": .., "length": 4096, "document": "..",
   "questions": [{"task": "..", "question": "..", "answer": ".."}]}
A document is read once for all its questions, which are then asked together. With -v, wrong answers
are printed. Interrupted or failing, it still prints and appends what was answered until then.

  --attention LIST         modes to score (default dense,sparse)
  --limit N                only the first N documents
  --parallel N             questions of a document asked at a time (default 16)
  -n, --max-tokens N       longest answer (default: the longest expected one and some more)
  --jsonl FILE             append one record per task, length and mode
  --system TEXT            system message
  --enable-thinking, --no-thinking  the chat template's switch

)";

}  // namespace

std::string help_text(const std::string& command) {
  const std::string bench = std::string(kModelHelp) + kVerboseHelp + kSparseHelp;
  const std::string answers = std::string(kModelHelp) + kContextHelp + kVerboseHelp + kSparseHelp;
  if (command == "run") return kRunHelp + (kSamplingHelp + answers);
  if (command == "chat") return kChatHelp + (kSamplingHelp + answers);
  if (command == "bench") return kBenchHelp + bench;
  if (command == "inspect") return std::string(kInspectHelp) + kModelHelp + kSparseHelp;
  if (command == "tokenize") return kTokenizeHelp;
  if (command == "eval") return kEvalHelp + answers;
  return kOverview;
}

}  // namespace infllm::app
