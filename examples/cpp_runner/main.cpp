// Generates text with a flashpte export, under ExecuTorch's C++ runtime. It reads from top to bottom: options, the
// tokenizer, the program, the choice of a token, plain and speculative decoding, statistics.
//
//   cpp_runner MODEL_DIR --prompt "The capital of France is" --max-new-tokens 64
//   cpp_runner MODEL_DIR --prompt-ids 2,105,9731 --temperature 0.8 --seed 7
//
// MODEL_DIR is what `export-model` writes. The text (ids after --prompt-ids) goes to stdout, statistics and errors to
// stderr. Exit codes: 0 success, 1 failure (a file, the GPU, a full cache), 2 wrong options or a wrong prompt.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>
#ifdef CPP_RUNNER_TOKENIZER
#include <pytorch/tokenizers/hf_tokenizer.h>
#endif

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using Int = int64_t;
using Tokens = std::vector<Int>;

constexpr int kFailed = 1, kUsage = 2;  // exit codes

// Thrown, not passed to std::exit: the delegate removes its temporary files when the program is destroyed.
struct Failure : std::runtime_error {
  int exit_code;
  Failure(int code, const std::string& what) : std::runtime_error(what), exit_code(code) {}
};

static void require(bool holds, int exit_code, const std::string& what) {
  if (!holds) throw Failure(exit_code, what);
}

static void check(Error error, const std::string& what) {
  require(error == Error::Ok, kFailed, what + ": " + executorch::runtime::to_string(error));
}

// ---- Options -------------------------------------------------------------------------------------------------------

struct Options {
  std::string folder;
  std::optional<std::string> prompt;
  Tokens prompt_ids;
  Int max_new_tokens = 128;
  double temperature = 0;
  unsigned seed = 0;
  bool cuda_graph = true, draft = true, eos = true, bos = false;
};

constexpr const char* kHelp =
    "cpp_runner MODEL_DIR (--prompt TEXT | --prompt-ids 1,2,3) [options]\n"
    "  --max-new-tokens N  most tokens to generate (default: 128)\n"
    "  --temperature T     divides the logits before a token is drawn; 0 takes the most likely one (default: 0)\n"
    "  --seed S            seed of the draws (default: 0)\n"
    "  --bos               put the beginning-of-text token before --prompt\n"
    "  --ignore-eos        do not stop at an end-of-text token\n"
    "  --no-draft          decode one token at a time, even if the program has a draft\n"
    "  --no-cuda-graph     do not record decode and target_verify as CUDA graphs\n";

template <typename T>
static void read_number(const std::string& name, const std::string& text, T& value) {
  std::istringstream in(text);
  require((in >> value) && in.eof(), kUsage, name + " " + text + ": not a number in range");
}

static Options parse(const std::vector<std::string>& args) {
  Options o;
  for (size_t i = 0; i < args.size(); i++) {
    const std::string name = args[i];
    const auto value = [&] {
      require(++i < args.size(), kUsage, name + " needs a value");
      return args[i];
    };
    if (name == "--prompt") o.prompt = value();
    else if (name == "--prompt-ids") {
      std::istringstream list(value());
      for (std::string id; std::getline(list, id, ',');) read_number(name, id, o.prompt_ids.emplace_back());
    } else if (name == "--max-new-tokens") read_number(name, value(), o.max_new_tokens);
    else if (name == "--temperature") read_number(name, value(), o.temperature);
    else if (name == "--seed") read_number(name, value(), o.seed);
    else if (name == "--bos") o.bos = true;
    else if (name == "--ignore-eos") o.eos = false;
    else if (name == "--no-draft") o.draft = false;
    else if (name == "--no-cuda-graph") o.cuda_graph = false;
    else if (name.rfind("--", 0) == 0 || !o.folder.empty()) throw Failure(kUsage, "unknown argument " + name);
    else o.folder = name;
  }
  require(!o.folder.empty(), kUsage, "no MODEL_DIR; see --help");
  require(o.prompt.has_value() == o.prompt_ids.empty(), kUsage, "give one of --prompt and --prompt-ids");
  require(o.max_new_tokens >= 1, kUsage, "--max-new-tokens must be at least 1");
  require(o.temperature >= 0, kUsage, "--temperature must be at least 0");
  return o;
}

// ---- The tokenizer -------------------------------------------------------------------------------------------------

struct Tokenizer {
  std::function<Tokens(const std::string&)> encode;
  std::function<std::string(Int, Int)> piece;  // (previous token, token) -> the token's bytes
};

// Reads tokenizer.json of the export. ExecuTorch's HFTokenizer may leave out the beginning-of-text token that the
// Hugging Face tokenizer adds; --bos adds it.
static Tokenizer load_tokenizer(const std::string& folder) {
  const std::string path = folder + "/tokenizer.json";
#ifdef CPP_RUNNER_TOKENIZER
  const auto hf = std::make_shared<tokenizers::HFTokenizer>();
  require(std::filesystem::exists(path), kFailed, path + " is missing; give --prompt-ids");
  require(hf->load(path) == tokenizers::Error::Ok, kFailed, "cannot read " + path);
  const auto encode = [hf](const std::string& text) {
    const auto ids = hf->encode(text, 0, 0);
    require(ids.ok(), kFailed, "the tokenizer cannot encode the prompt");
    return Tokens(ids->begin(), ids->end());
  };
  const auto piece = [hf](Int previous, Int token) {
    const auto bytes = hf->decode(previous, token);
    return bytes.ok() ? *bytes : std::string();
  };
  return {encode, piece};
#else
  throw Failure(kUsage, "built without a tokenizer for " + path + ": give --prompt-ids");
#endif
}

// ---- The program ---------------------------------------------------------------------------------------------------

// Features [1, rows, C] of the positions from `start` on: what a draft reads. A copy, because the next call of the
// method that returned them may overwrite its output.
struct Features {
  Int start = 0, rows = 0, size = 0;
  ScalarType dtype = ScalarType::Float;
  std::vector<uint8_t> bytes;

  Features() = default;
  Features(const Tensor& all, Int first, Int count, Int position)
      : start(position), rows(count), size(all.size(2)), dtype(all.scalar_type()) {
    const size_t row = all.nbytes() / all.size(1);
    const auto* data = static_cast<const uint8_t*>(all.const_data_ptr()) + first * row;
    bytes.assign(data, data + count * row);
  }
};

class Program {
 public:
  // From the constant methods that export-model writes. The runner must keep to them: the runtime checks no position
  // and no lower bound of a length.
  Int context = 0, vocabulary = 0;
  Int min_prefill = 0, max_prefill = 0;  // tokens of one prefill; 0 without that method
  Int chain = 0, verify_window = 0;      // most proposals of a draft, tokens of one target_verify
  std::optional<Int> bos;
  std::set<Int> eos;
  bool speculates = false;

  explicit Program(const Options& o)
      : module_(o.folder + "/model.pte", o.folder + "/aoti_cuda_blob.ptd", Module::LoadMode::Mmap) {
    for (const char* name : {"/model.pte", "/aoti_cuda_blob.ptd", "/manifest.json"})
      require(std::filesystem::exists(o.folder + name), kFailed, o.folder + name + " is missing");
    check(module_.load(), "cannot load " + o.folder + "/model.pte");
    auto names = module_.method_names();
    check(names.error(), "cannot read the names of the methods");
    names_ = *names;
    const bool draft = has("prefill") && has("target_verify") && has("draft_decode");
    speculates = draft && o.draft && goes_back_by_position(o);
    require(speculates || has("decode"), kFailed,
            draft ? "no decode: export with --with-decode" : "no decode, no draft: not from export-model");
    context = constant("get_max_context_len");
    vocabulary = constant("get_vocab_size");
    if (has("prefill")) {
      min_prefill = constant("get_min_prefill_chunk");
      max_prefill = constant("get_max_prefill_chunk");
    }
    if (has("get_bos_id")) bos = constant("get_bos_id");
    if (has("get_eos_ids") && o.eos)
      for (const EValue& id : execute("get_eos_ids", {})) eos.insert(id.toInt());
    if (speculates) {
      chain = constant("get_chain_len");
      verify_window = constant("get_verify_window");
      const bool all = constant("get_max_draft_tokens") >= std::max(max_prefill, verify_window);
      require(all, kFailed, "draft_decode takes fewer rows than other methods return");
    }
  }

  // Loads the methods, with their weights.
  void load(bool cuda_graph) {
    // The option belongs to the backend, which reads it when a method loads. Other methods have no static shape.
    executorch::runtime::BackendOptions<1> options;
    check(options.set_option("enable_cuda_graph_for_method", "decode,target_verify"), "cannot ask for CUDA graphs");
    if (cuda_graph) check(executorch::runtime::set_option("CudaBackend", options.view()), "no CUDA backend");
    for (const std::string method : {"prefill", "decode", "target_verify", "draft_decode"}) {
      const bool used = method == "prefill" ? has(method) : (method == "decode") != speculates;
      if (!used) continue;
      const auto meta = module_.method_meta(method);
      check(meta.error(), "cannot read " + method);
      require(meta->num_inputs() == (method == "draft_decode" ? 3u : 2u), kFailed,
              method + " has other inputs: export without --runner executorch-gemma");
      check(module_.load_method(method), "cannot load " + method + " (is this a GPU of the export's --arch?)");
    }
  }

  // Runs a method on tokens at positions start, start + 1, ... The results stay valid until it runs again.
  std::vector<EValue> run(const std::string& method, Tokens tokens, Int start, Features* features = nullptr) {
    using executorch::extension::from_blob;
    const int count = static_cast<int>(tokens.size());
    Tokens positions(tokens.size());
    for (int i = 0; i < count; i++) positions[i] = start + i;
    const auto ids = from_blob(tokens.data(), {1, count}, ScalarType::Long);
    const auto at = from_blob(positions.data(), {count}, ScalarType::Long);
    if (features == nullptr) return execute(method, {ids, at});
    const int size = static_cast<int>(features->size);
    return execute(method, {ids, from_blob(features->bytes.data(), {1, count, size}, features->dtype), at});
  }

 private:
  Module module_;
  std::unordered_set<std::string> names_;

  bool has(const std::string& method) const { return names_.count(method) > 0; }

  std::vector<EValue> execute(const std::string& method, const std::vector<EValue>& inputs) {
    const auto results = module_.execute(method, inputs);
    check(results.error(), method + " failed");
    return *results;
  }

  Int constant(const std::string& name) {
    require(has(name), kFailed, "the program has no " + name + ": not from export-model");
    return execute(name, {}).at(0).toInt();
  }

  // Keys and values go back by a smaller position. Other states must be restored from a copy, which a Module cannot
  // make; such a program decodes token by token.
  static bool goes_back_by_position(const Options& o) {
    std::ifstream in(o.folder + "/manifest.json");
    const std::string text{std::istreambuf_iterator<char>(in), {}};
    const auto says = [&](const char* words) { return text.find(words) != std::string::npos; };
    return !says("\"goes_back\": \"snapshot\"") && !says("\"fed_twice\": false");
  }
};

// ---- The choice of a token -----------------------------------------------------------------------------------------

// Row `index` of logits [1, T, V].
static std::vector<float> row_of(const Tensor& logits, Int index) {
  std::vector<float> row(logits.size(2));
  const auto read = [&](const auto* data) { std::copy_n(data + index * row.size(), row.size(), row.begin()); };
  const ScalarType dtype = logits.scalar_type();
  if (dtype == ScalarType::Float) read(logits.const_data_ptr<float>());
  else if (dtype == ScalarType::Half) read(logits.const_data_ptr<executorch::aten::Half>());
  else if (dtype == ScalarType::BFloat16) read(logits.const_data_ptr<executorch::aten::BFloat16>());
  else throw Failure(kFailed, "the logits are neither float32, float16 nor bfloat16");
  return row;
}

struct Sampler {
  double temperature;
  std::mt19937 random;

  // Row `first` + i of the logits follows i proposals. Keeps proposals up to a rejection and adds the target's own next
  // token. At temperature 0 a proposal is kept if it is the most likely token. Otherwise it is kept with its
  // probability, and after a rejection the next token is drawn without it. So the tokens have the target's
  // distribution, whatever the draft proposes.
  Tokens choose(const Tensor& logits, Int first, const Tokens& proposals = {}) {
    for (size_t i = 0;; i++) {
      const std::vector<float> row = row_of(logits, first + static_cast<Int>(i));
      const bool finite = std::all_of(row.begin(), row.end(), [](float x) { return x < INFINITY; });
      require(finite, kFailed, "the logits hold a NaN or an infinity");
      const auto best = std::max_element(row.begin(), row.end());
      Int token = best - row.begin();
      if (temperature > 0) {
        std::vector<double> weights;
        for (const float x : row) weights.push_back(std::exp((x - *best) / temperature));
        std::discrete_distribution<Int> all(weights.begin(), weights.end());
        token = all(random);  // equals the proposal with its probability; any other token is a draw without it
      }
      if (i < proposals.size() && proposals[i] == token) continue;
      Tokens kept(proposals.begin(), proposals.begin() + static_cast<Int>(i));
      kept.push_back(token);
      return kept;
    }
  }
};

// ---- Generation ----------------------------------------------------------------------------------------------------

using Clock = std::chrono::steady_clock;

struct Generation {
  Program& program;
  Sampler sampler;
  std::function<void(Int, Int)> show;  // called with the previous token and a new one
  Tokens tokens;                       // the prompt, then the generated tokens
  Int prompt, most;                    // tokens of the prompt, most tokens of both
  bool stopped = false, cache_full = false;
  Clock::time_point begin = Clock::now(), prompt_end = begin;
  std::vector<Clock::time_point> times = {};  // when each call had given its tokens
  Int first_tokens = 0, rounds = 0;           // tokens of the first call; calls of target_verify
  Tokens offered = {}, kept = {};             // how many rounds had a proposal i, and kept it
  Int held = 0;                               // positions whose keys are in the target's cache
  Features unread = {};                       // features that the draft has not read

  Int length() const { return static_cast<Int>(tokens.size()); }
  Tokens slice(Int first, Int end) const { return Tokens(tokens.begin() + first, tokens.begin() + end); }

  // Adds tokens up to an end-of-text token, which is not shown, or to the most.
  void append(const Tokens& more) {
    for (size_t i = 0; i < more.size() && !stopped; i++) {
      const bool end = program.eos.count(more[i]) > 0;
      if (!end) show(tokens.back(), more[i]);
      tokens.push_back(more[i]);
      stopped = end || length() == most;
    }
    if (!stopped && length() > program.context) stopped = cache_full = true;  // no slot for the last token
    times.push_back(Clock::now());
    if (times.size() == 1) first_tokens = length() - prompt;
  }

  // Bounds of prefill calls. Each takes as many tokens as it may, and gives some up where the next would be too short.
  // Where no sizes add up, the last call takes tokens again (`again`), or there are no bounds.
  std::vector<std::pair<Int, Int>> chunks(bool again) const {
    const Int least = program.min_prefill, longest = program.max_prefill;
    if (longest == 0 || prompt < least) return {};
    std::vector<std::pair<Int, Int>> bounds;
    const Int calls = (prompt + longest - 1) / longest;
    const bool fits = prompt >= calls * least;
    for (Int call = 1, start = 0; call <= calls; call++) {
      const Int end = start + std::min(longest, prompt - start - (fits ? (calls - call) * least : 0));
      bounds.emplace_back(start, end);
      start = end;
    }
    if (fits) return bounds;
    bounds.back().first = prompt - least;
    return again ? bounds : std::vector<std::pair<Int, Int>>();
  }

  void decode() {
    std::vector<EValue> results;
    for (const auto& [start, end] : chunks(false)) results = program.run("prefill", slice(start, end), start);
    if (results.empty())  // too short for prefill
      for (Int at = 0; at < prompt; at++) results = program.run("decode", slice(at, at + 1), at);
    prompt_end = Clock::now();
    while (true) {
      const Tensor& logits = results.at(0).toTensor();
      append(sampler.choose(logits, logits.size(1) - 1));
      if (stopped) return;
      results = program.run("decode", {tokens.back()}, length() - 1);
    }
  }

  // The last token, the anchor, has no keys in the target's cache yet. In one round the draft proposes tokens, reading
  // the features of the positions accepted last; target_verify takes the anchor and the proposals; the accepted ones
  // and the target's next token, the new anchor, are appended. After a rejection the next call starts at a smaller
  // position, and nothing else: no row sees the keys of rejected tokens before they are overwritten.
  void speculate() {
    for (const auto& [start, end] : chunks(true)) {
      const auto results = program.run("prefill", slice(start, end), start);
      unread = Features(results.at(1).toTensor(), 0, end - start, start);
      held = end;
      if (end < prompt) {
        draft(slice(start + 1, end + 1), unread);  // the token after each position is known
        continue;
      }
      prompt_end = Clock::now();
      const Tensor& logits = results.at(0).toTensor();
      append(sampler.choose(logits, logits.size(1) - 1));
    }
    require(held > 0 || prompt <= program.verify_window, kUsage,
            "the prompt is too short for prefill, too long for target_verify");
    offered.assign(program.chain, 0);
    kept = offered;
    while (!stopped) {
      const Tokens proposals = propose(most - length() - 1);
      // A call near the end of the caches starts earlier and takes tokens again, which writes the same keys.
      const Int start = std::min(held, program.context - program.verify_window);
      Tokens row = slice(start, length());
      const Int anchor = static_cast<Int>(row.size()) - 1;
      row.insert(row.end(), proposals.begin(), proposals.end());
      row.resize(program.verify_window, row.back());  // padding, overwritten before a row sees it
      const auto results = program.run("target_verify", row, start);
      const Tokens more = sampler.choose(results.at(0).toTensor(), anchor, proposals);
      if (times.empty()) prompt_end = Clock::now();
      const Int end = length() + static_cast<Int>(more.size()) - 1;
      unread = Features(results.at(1).toTensor(), held - start, end - held, held);
      held = end;
      rounds++;
      for (size_t i = 0; i < proposals.size(); i++) offered[i]++;
      for (size_t i = 0; i + 1 < more.size(); i++) kept[i]++;
      append(more);
    }
  }

  // At most `wanted` proposals, limited by the chain, the window of target_verify and the caches.
  Tokens propose(Int wanted) {
    const Int room = std::min(program.context - length(), program.verify_window - (length() - held));
    const Int count = std::min({program.chain, wanted, room});
    Tokens proposals, after = slice(unread.start + 1, unread.start + unread.rows + 1);
    while (unread.rows > 0 && static_cast<Int>(proposals.size()) < count) {
      proposals.push_back(draft(after, unread));
      after = {proposals.back()};  // the next step reads the draft's own token and feature
    }
    return proposals;
  }

  // Feeds features to the draft, each with the token after its position. Returns a proposal, and in `features` the
  // draft's own feature, which belongs to the position after them.
  Int draft(const Tokens& after, Features& features) {
    const auto results = program.run("draft_decode", after, features.start, &features);
    features = Features(results.at(1).toTensor(), 0, 1, features.start + features.rows);
    return results.at(0).toTensor().const_data_ptr<Int>()[0];
  }
};

// ---- Statistics ----------------------------------------------------------------------------------------------------

static void print_statistics(const Generation& g, double load_s) {
  const auto seconds = [](auto a, auto b) { return std::chrono::duration<double>(b - a).count(); };
  const Int later = g.length() - g.prompt - g.first_tokens;
  std::cerr << std::fixed << std::setprecision(1) << "load                 " << load_s << " s\n"
            << "prefill              " << g.prompt << " tokens, " << g.prompt / seconds(g.begin, g.prompt_end)
            << " tokens/s\ntime to first token  " << 1e3 * seconds(g.begin, g.times.front()) << " ms\n";
  if (later > 0)
    std::cerr << "decode               " << later << " tokens in " << g.times.size() - 1 << " calls, "
              << later / seconds(g.times.front(), g.times.back()) << " tokens/s\n";
  if (g.rounds == 0) return;
  std::cerr << "tokens per round     " << 1.0 + std::accumulate(g.kept.begin(), g.kept.end(), 0.0) / g.rounds << " in "
            << g.rounds << " rounds, proposals kept";
  for (size_t i = 0; i < g.kept.size() && g.offered[i] > 0; i++)
    std::cerr << " " << 100.0 * g.kept[i] / g.offered[i] << "%";
  std::cerr << "\n";
}

static void generate(const Options& o) {
  const auto start = Clock::now();
  std::optional<Tokenizer> tokenizer;
  if (o.prompt) tokenizer = load_tokenizer(o.folder);
  Program program(o);
  Tokens prompt = o.prompt ? tokenizer->encode(*o.prompt) : o.prompt_ids;
  require(!o.bos || program.bos, kUsage, "--bos: the program names no beginning-of-text token");
  if (o.bos && (prompt.empty() || prompt.front() != *program.bos)) prompt.insert(prompt.begin(), *program.bos);
  const Int count = static_cast<Int>(prompt.size());
  const std::string holds = "the cache holds " + std::to_string(program.context);
  const auto show = [&](Int previous, Int token) {
    std::cout << (tokenizer ? tokenizer->piece(previous, token) : std::to_string(token) + " ") << std::flush;
  };
  require(count > 0, kUsage, "the prompt is empty");
  require(count <= program.context, kUsage, "the prompt has " + std::to_string(count) + " tokens, " + holds);
  for (const Int id : prompt)
    require(id >= 0 && id < program.vocabulary, kUsage, "prompt token " + std::to_string(id) + " is no token");
  program.load(o.cuda_graph);
  const double load_s = std::chrono::duration<double>(Clock::now() - start).count();
  Generation g{program, {o.temperature, std::mt19937(o.seed)}, show, prompt, count, count + o.max_new_tokens};
  program.speculates ? g.speculate() : g.decode();
  std::cout << std::endl;
  print_statistics(g, load_s);
  require(!g.cache_full, kFailed, "the cache is full; " + holds);
}

int main(int argc, char** argv) {
  const std::vector<std::string> args(argv + 1, argv + argc);
  if (std::count(args.begin(), args.end(), "--help") > 0) return !(std::cout << kHelp);
  try {
    generate(parse(args));
    return 0;
  } catch (const Failure& failure) {
    std::cerr << "error: " << failure.what() << std::endl;
    return failure.exit_code;
  }
}
