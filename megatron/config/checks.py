"""Checks across values, one function each. They need no hardware and no optional package."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from megatron.config.architecture import ARCHITECTURES
from megatron.config.batch_triangle import NEITHER_GIVEN
from megatron.config.model_size import count_parameters
from megatron.config.optimizer import facts_of, registered_optimizers
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.config.token_share import TOKEN_KEYS
from megatron.registry import variant_names


@dataclass(frozen=True)
class Finding:
    """Values that do not fit together, reported at one of them."""

    path: str
    """Dotted path of the value to point at."""
    message: str
    """What is wrong, why, and a way out. Other values are named by their YAML keys."""


def nearest_multiple(value: int, divisor: int) -> int:
    """Returns the positive multiple of `divisor` that lies nearest to `value`."""
    return max(round(value / divisor), 1) * divisor


def divisors(value: int) -> list[int]:
    """Lists the divisors of `value`, from 1 to itself."""
    return [number for number in range(1, value + 1) if value % number == 0]


def _nearest(valid: Iterable[int], value: int) -> int:
    return min(valid, key=lambda number: abs(number - value))


def _does_not_split(ranks: int) -> str:
    return f"does not split over model_parallel_size {ranks}"


def tensor_sizes(run: RunConfig) -> list[int]:
    """Lists the tensor-parallel sizes over which heads, vocabulary and every other size of the model split."""
    model = run.model
    sizes = [attrgetter(path)(model) for path in ARCHITECTURES[model.architecture].split_sizes]
    sizes += [model.num_attention_heads, model.num_kv_heads, model.padded_vocab_size]
    if model.padded_vocab_size is None:
        sizes.append(model.make_vocab_size_divisible_by)
    if run.parallel.sequence_parallel:
        sizes.append(model.seq_length)
    return divisors(math.gcd(*(size for size in sizes if size)))


def _or_tensor_size(run: RunConfig) -> str:
    """Names tensor-parallel sizes that fit the model as it is."""
    *others, last = (str(size) for size in tensor_sizes(run)[:_MOST_PROPOSED])
    return f"; or model_parallel_size {', '.join(others)} or {last}" if others else "; or model_parallel_size 1"


_MOST_PROPOSED = 8


def parallel_sizes(run: RunConfig, world_size: int) -> Iterator[tuple[int, int]]:
    """Yields the tensor-parallel sizes and pipeline stages into which model and ranks divide."""
    for tensor in (size for size in tensor_sizes(run) if world_size % size == 0):
        for stages in divisors(world_size // tensor):
            if stages <= run.model.num_layers:
                yield tensor, stages


def _heads(run: RunConfig) -> Iterator[Finding]:
    hidden, heads = run.model.hidden_size, run.model.num_attention_heads
    ranks = run.parallel.model_parallel_size
    if hidden % heads == 0 and heads % ranks == 0:
        return
    wrong = f"does not divide hidden_size {hidden}" if hidden % heads else _does_not_split(ranks)
    valid = [count for count in divisors(hidden) if count % ranks == 0]
    if valid:
        other = "" if hidden % heads else _or_tensor_size(run)
        yield Finding("model.num_attention_heads", f"{wrong}; nearest valid value: {_nearest(valid, heads)}{other}")
    else:
        yield Finding(
            "parallel.model_parallel_size",
            f"does not divide hidden_size {hidden}, so no number of heads splits over it; nearest valid value: "
            f"{_nearest(divisors(hidden), ranks)}",
        )


def _key_value_heads(run: RunConfig) -> Iterator[Finding]:
    """Requires whole groups of query heads, and whole heads of keys and values on every tensor-parallel rank."""
    heads, shared, ranks = run.model.num_attention_heads, run.model.num_kv_heads, run.parallel.model_parallel_size
    if shared is None:
        return
    if heads % shared:
        nearest = _nearest(divisors(heads), shared)
        message = f"does not divide num_attention_heads {heads}, which share them; nearest valid value: {nearest}"
        yield Finding("model.num_kv_heads", message)
    elif shared % ranks and heads % ranks == 0:
        wrong = f"is above num_kv_heads {shared}" if ranks > shared else f"does not divide num_kv_heads {shared}"
        sizes = [size for size in divisors(shared) if heads % size == 0]
        yield Finding(
            "parallel.model_parallel_size",
            f"{wrong}, and each rank holds whole heads of keys and values; nearest valid value: "
            f"{_nearest(sizes, ranks)}",
        )


def _activation(run: RunConfig) -> Iterator[Finding]:
    name = run.model.architecture
    known = ARCHITECTURES[name].activations
    if run.model.activation not in known and "activation" not in ARCHITECTURES[name].fixed:
        yield Finding("model.activation", f"the architecture {name} has {' and '.join(known)} alone")


def _rotary_dimensions(run: RunConfig) -> Iterator[Finding]:
    model = run.model
    if model.pos_emb != "rotary" or model.hidden_size % model.num_attention_heads:
        return
    head_dim = model.hidden_size // model.num_attention_heads
    rotated = int(head_dim * model.rotary_pct)
    if rotated < 2 or rotated % 2:
        yield Finding(
            "model.rotary_pct",
            f"rotates {rotated} of the {head_dim} dimensions of a head; rotary positions need an even number above 0",
        )


def _positions(run: RunConfig) -> Iterator[Finding]:
    length, longest = run.model.seq_length, run.model.max_position_embeddings
    if length > longest:
        learned = ", which are the positions that the model learns" if run.model.pos_emb == "learned" else ""
        yield Finding(
            "model.seq_length", f"is above max_position_embeddings {longest}{learned}; raise that, or shorten this"
        )


def _padded_vocabulary(run: RunConfig) -> Iterator[Finding]:
    padded, multiple = run.model.padded_vocab_size, run.model.make_vocab_size_divisible_by
    if padded is not None and padded % multiple:
        yield Finding(
            "model.padded_vocab_size",
            f"is not a multiple of make_vocab_size_divisible_by {multiple}; nearest valid value: "
            f"{nearest_multiple(padded, multiple)}",
        )


def _fixed_by_architecture(run: RunConfig) -> Iterator[Finding]:
    for path, fixed in ARCHITECTURES[run.model.architecture].fixed.items():
        if attrgetter(path)(run.model) != fixed.value:
            yield Finding(f"model.{path}", fixed.reason)
    for name in ARCHITECTURES:
        for path in ARCHITECTURES[name].own_fields if name != run.model.architecture else ():
            if attrgetter(path)(run.model) != ModelConfig.model_fields[path].default:
                yield Finding(f"model.{path}", f"belongs to architecture: {name}, and this is {run.model.architecture}")


def _tensor_parallel_sizes(run: RunConfig) -> Iterator[Finding]:
    model, ranks = run.model, run.parallel.model_parallel_size
    for path in ARCHITECTURES[model.architecture].split_sizes:
        size = attrgetter(path)(model)
        if size is not None and size % ranks:
            nearest = nearest_multiple(size, ranks)
            yield Finding(
                f"model.{path}", f"{_does_not_split(ranks)}; nearest valid value: {nearest}{_or_tensor_size(run)}"
            )
    if run.parallel.sequence_parallel and model.seq_length % ranks:
        nearest = nearest_multiple(model.seq_length, ranks)
        if nearest > max(model.max_position_embeddings, ranks):
            nearest -= ranks
        yield Finding(
            "model.seq_length", f"{_does_not_split(ranks)}, as sequence_parallel asks; nearest valid value: {nearest}"
        )


def _param_token_groups(run: RunConfig) -> Iterator[Finding]:
    tokens = run.model.param_tokens
    if tokens is None:
        return
    for field in TOKEN_KEYS:
        count = getattr(tokens, field)
        if count % tokens.groups:
            yield Finding(
                f"model.param_tokens.{field}",
                f"does not split into param_token_groups {tokens.groups} equal blocks; nearest valid value: "
                f"{nearest_multiple(count, tokens.groups)}",
            )


def _tensor_parallel_vocabulary(run: RunConfig) -> Iterator[Finding]:
    """Requires a padded vocabulary that splits over tensor ranks: its padding never depends on the layout."""
    ranks, padded = run.parallel.model_parallel_size, run.model.padded_vocab_size
    multiple = run.model.make_vocab_size_divisible_by
    if padded is None and multiple % ranks:
        yield Finding(
            "parallel.model_parallel_size",
            f"does not divide the multiple to which the vocabulary is padded, make_vocab_size_divisible_by {multiple}; "
            f"nearest valid value: {_nearest(divisors(multiple), ranks)}, or give padded_vocab_size, or pad as NeoX "
            f"does on so many ranks, with make_vocab_size_divisible_by: {multiple * ranks}",
        )
    if padded is not None and padded % ranks:
        nearest = nearest_multiple(padded, math.lcm(ranks, multiple))
        yield Finding(
            "model.padded_vocab_size",
            f"{_does_not_split(ranks)}; nearest valid value: {nearest}{_or_tensor_size(run)}",
        )


_MOST_PARAMETERS = 10**14


def _parameters_are_countable(run: RunConfig) -> Iterator[Finding]:
    model = run.model
    count = count_parameters(model, model.padded_vocab_size or model.make_vocab_size_divisible_by)
    if count > _MOST_PARAMETERS:
        yield Finding(
            "model.num_layers",
            f"makes {count:,} parameters with hidden_size {model.hidden_size}; is one of the sizes mistyped?",
        )


_FILES = (
    *("data.data_path", "data.train_data_paths", "data.valid_data_paths", "data.test_data_paths"),
    *("data.train_label_data_paths", "data.valid_label_data_paths", "data.test_label_data_paths"),
    *("data.index_cache_dir", "data.tokenizer.vocab_file", "data.tokenizer.merge_file"),
    *("checkpoint.save", "checkpoint.load", "checkpoint.pretrain_partial_init", "checkpoint.remote_cache_dir"),
    *("monitor.log_dir", "monitor.tensorboard_dir", "generation.sample_input_file", "generation.sample_output_file"),
    *("evaluation.include_path", "evaluation.output", "evaluation.results_prefix", "evaluation.cache"),
    "evaluation.hf_model",
)
"""Values that name files and folders."""
_LONGEST_NAME = 200
"""Bytes of a file's name [bytes]; Linux has 255, and what is written adds endings."""
_LONGEST_PATH = 3500
"""Bytes of a path [bytes]; Linux has 4095."""


def _file_names(run: RunConfig) -> Iterator[Finding]:
    for path in (*_FILES, *([] if run.distillation is None else ["distillation.teacher"])):
        value = attrgetter(path)(run)
        for name in value if isinstance(value, list) else [value]:
            if name == "" and path != "evaluation.results_prefix":
                yield Finding(path, "names no file or folder; give null, or leave the key out")
            elif name is not None and len(name.encode()) > _LONGEST_PATH:
                yield Finding(path, f"is longer than {_LONGEST_PATH:,} bytes, which no path can be")
            elif name is not None and any(len(part.encode()) > _LONGEST_NAME for part in name.split("/")):
                yield Finding(
                    path, f"has a part of more than {_LONGEST_NAME} bytes; no file with an ending can have it"
                )


def _pipeline_stages(run: RunConfig) -> Iterator[Finding]:
    stages, layers = run.parallel.pipe_parallel_size, run.model.num_layers
    if stages > layers:
        yield Finding(
            "parallel.pipe_parallel_size",
            f"is above num_layers {layers}, and each stage needs a layer; nearest valid value: {layers}",
        )
    kind, _, pattern = run.parallel.pipe_partition_method.partition(":")
    if kind == "type":
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield Finding("parallel.pipe_partition_method", f"is no regular expression after type: ({error})")
            return
        names = pipeline_layer_types(run.model)
        if not any(re.search(pattern, name, re.IGNORECASE) for name in names):
            yield Finding(
                "parallel.pipe_partition_method",
                f"no layer has such a name, only {', '.join(names)}; use type:transformer, which spreads the "
                "transformer layers evenly",
            )


def pipeline_layer_types(model: ModelConfig) -> list[str]:
    """Lists the names of the classes of a model's layers, in the order of the pipeline."""
    norms = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm", "layernorm_nonparam": "NonParametricLayerNorm"}
    final_norm = norms[model.final_norm or model.norm]
    return ["TokenEmbedding", "TransformerLayer", final_norm, "TiedHead" if model.tie_embeddings else "Head"]


def _batch_is_given(run: RunConfig) -> Iterator[Finding]:
    training = run.training
    if training.train_batch_size is None and training.train_micro_batch_size_per_gpu is None:
        path = "train_batch_size" if training.gradient_accumulation_steps is None else "gradient_accumulation_steps"
        yield Finding(f"training.{path}", NEITHER_GIVEN)


def _batch_divides(run: RunConfig) -> Iterator[Finding]:
    """Requires a global batch that is a multiple of what one rank contributes, whatever the number of ranks."""
    training = run.training
    total = training.train_batch_size
    micro, steps = training.train_micro_batch_size_per_gpu, training.gradient_accumulation_steps
    share = (micro or 1) * (steps or 1)
    if total is not None and total % share:
        given = [f"micro batch {micro}"] * (micro is not None) + [f"accumulation {steps}"] * (steps is not None)
        yield Finding(
            "training.train_batch_size",
            f"is not a multiple of {' x '.join(given)}; nearest valid value: {nearest_multiple(total, share)}",
        )


_MOST_SAMPLES = 10**11
"""Samples of a run whose order is made: several hundred times what the published runs read."""


def _batch_keys(run: RunConfig) -> str:
    if run.training.train_batch_size is not None:
        return "train_batch_size"
    return "train_micro_batch_size_per_gpu x gradient_accumulation_steps"


def _samples_are_countable(run: RunConfig) -> Iterator[Finding]:
    """Refuses runs whose index of samples no machine holds; `sample_counts` in megatron/data has the same numbers."""
    training = run.training
    micro, steps = training.train_micro_batch_size_per_gpu, training.gradient_accumulation_steps
    batch = training.train_batch_size or (micro or 1) * (steps or 1)
    validations = training.train_iters // training.eval_interval + 1
    for path, what, batches in (
        ("train_iters", "training", training.train_iters),
        ("eval_iters", "validation", validations * training.eval_iters),
    ):
        if batches * batch > _MOST_SAMPLES:
            yield Finding(
                f"training.{path}",
                f"{what} would read {batches * batch:,} samples in batches of {batch} ({_batch_keys(run)}); at most "
                f"{_MOST_SAMPLES:,} are put in order",
            )


def _optimizer_values(run: RunConfig) -> Iterator[Finding]:
    section = run.training.optimizer
    for name, message in facts_of(section).check(section):
        yield Finding(f"training.optimizer.{name}", message)


def _smallest_learning_rate(run: RunConfig) -> Iterator[Finding]:
    lowest, peak = run.training.lr_schedule.min_lr, run.training.optimizer.lr
    if lowest > peak:
        yield Finding("training.lr_schedule.min_lr", f"is above optimizer.params.lr {peak:g}, the peak learning rate")


def _one_schedule(run: RunConfig) -> Iterator[Finding]:
    schedule = run.training.lr_schedule
    if schedule.override_lr_scheduler and schedule.use_checkpoint_lr_scheduler:
        yield Finding(
            "training.lr_schedule.override_lr_scheduler", "contradicts use_checkpoint_lr_scheduler: true; keep one"
        )


def _wsd_schedule(run: RunConfig) -> Iterator[Finding]:
    schedule = run.training.lr_schedule
    path, steps = "training.lr_schedule.wsd_decay_iters", schedule.wsd_decay_iters
    if schedule.style == "WSD" and steps is None:
        yield Finding("training.lr_schedule.style", "needs lr_wsd_decay_iters: the steps of its decay")
    if schedule.style != "WSD" and steps is not None:
        yield Finding(path, f"belongs to lr_decay_style: WSD, and this is {schedule.style}")
    key = "train_iters" if schedule.decay_iters is None else "lr_decay_iters"
    longest = schedule.decay_iters or run.training.train_iters
    if schedule.style == "WSD" and steps is not None and steps > longest:
        yield Finding(path, f"is above {key} {longest}, whose last steps they are")


def _split(run: RunConfig) -> Iterator[Finding]:
    shares = run.data.split.replace("/", ",").split(",")
    try:
        numbers = [float(share) for share in shares]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or not all(n >= 0 for n in numbers) or not 0 < sum(numbers) < math.inf:
        yield Finding("data.split", "expected up to three shares for training, validation and test, such as 969, 30, 1")


def _one_kind_of_dataset(run: RunConfig) -> Iterator[Finding]:
    data = run.data
    parts = {part: getattr(data, f"{part}_data_paths") for part in ("train", "valid", "test")}
    given = [part for part, paths in parts.items() if paths is not None]
    if data.data_path is not None and given:
        yield Finding("data.data_path", f"contradicts {given[0]}_data_paths; give one split dataset or separate ones")
    elif given and parts["train"] is None:
        yield Finding(f"data.{given[0]}_data_paths", "needs train_data_paths as well")
    elif given and parts["valid"] is None and run.training.eval_iters:
        yield Finding("data.train_data_paths", "needs valid_data_paths as well, or eval_iters: 0")


_MOST_DATASETS = 254
"""Datasets of a blend, as in NeoX: an item's dataset is a byte."""


def _dataset_lists(run: RunConfig) -> Iterator[Finding]:
    for part in ("train", "valid", "test"):
        paths, weights = getattr(run.data, f"{part}_data_paths"), getattr(run.data, f"{part}_data_weights")
        if paths is not None and not 1 <= len(paths) <= _MOST_DATASETS:
            yield Finding(
                f"data.{part}_data_paths", f"expected 1 to {_MOST_DATASETS} paths, and these are {len(paths)}"
            )
        labels = getattr(run.data, f"{part}_label_data_paths")
        if labels is not None and len(labels) != len(paths or ()):
            count = len(paths or ())
            yield Finding(f"data.{part}_label_data_paths", f"has {len(labels)} paths for {count} {part}_data_paths")
        if weights is None:
            continue
        if paths is None or len(weights) != len(paths):
            count = len(paths or ())
            yield Finding(f"data.{part}_data_weights", f"has {len(weights)} weights for {count} {part}_data_paths")
        elif sum(weights) <= 0:
            yield Finding(f"data.{part}_data_weights", "expected numbers of at least 0, not all 0")


def _tokenizer_files(run: RunConfig) -> Iterator[Finding]:
    tokenizer = run.data.tokenizer
    if tokenizer.type == "GPT2BPETokenizer" and tokenizer.vocab_file is not None and tokenizer.merge_file is None:
        yield Finding("data.tokenizer.vocab_file", "GPT2BPETokenizer needs merge_file as well; or use HFTokenizer")


_MOST_CHECKPOINTS = 10**6
_SMALLEST_RATIO = 1.0001


def _checkpoint_steps(run: RunConfig) -> Iterator[Finding]:
    factor, scale = run.checkpoint.checkpoint_factor, run.checkpoint.checkpoint_scale
    if factor is None:
        return
    if scale == "linear" and not float(factor).is_integer():
        yield Finding("checkpoint.checkpoint_factor", "expected a whole number of steps, or checkpoint_scale: log")
    elif scale == "linear" and run.training.train_iters / factor > _MOST_CHECKPOINTS:
        yield Finding(
            "checkpoint.checkpoint_factor",
            f"asks for more than {_MOST_CHECKPOINTS:,} checkpoints in train_iters {run.training.train_iters}",
        )
    if scale == "log" and factor < _SMALLEST_RATIO:
        yield Finding(
            "checkpoint.checkpoint_factor",
            f"expected a ratio above 1, of at least {_SMALLEST_RATIO}, with checkpoint_scale: log",
        )


def _checkpoint_to_load(run: RunConfig) -> Iterator[Finding]:
    checkpoint = run.checkpoint
    if checkpoint.load is None:
        if checkpoint.iteration is not None:
            yield Finding("checkpoint.iteration", "needs load: the folder of a checkpoint")
        if checkpoint.finetune:
            yield Finding("checkpoint.finetune", "needs load: the folder of a checkpoint")
    if checkpoint.auto_resume and checkpoint.save is None:
        yield Finding("checkpoint.auto_resume", "needs save: the folder that the run goes on from")
    if checkpoint.save_remote is not None and checkpoint.save is None:
        yield Finding("checkpoint.save_remote", "needs save: the folder from which checkpoints are uploaded")
    if checkpoint.auto_resume and checkpoint.iteration is not None and checkpoint.load == checkpoint.save:
        yield Finding(
            "checkpoint.iteration", "contradicts auto_resume: true, which goes on from the newest checkpoint; keep one"
        )


def _optimizer_switches(run: RunConfig) -> Iterator[Finding]:
    own = facts_of(run.training.optimizer).switches
    others = {switch for facts in registered_optimizers() for switch in facts.switches}.difference(own)
    for switch in sorted(others):
        if getattr(run.speedups, switch) == "on":
            name = run.training.optimizer.type
            yield Finding(f"speedups.{switch}", f"the optimizer {name} has no such implementation; use auto or off")
    chosen = [switch for switch in own if getattr(run.speedups, switch) == "on"]
    if len(chosen) > 1:
        yield Finding(f"speedups.{chosen[0]}", f"cannot be on together with {chosen[1]}; choose one of them")


def _flash_attention(run: RunConfig) -> Iterator[Finding]:
    if run.speedups.flash_attention == "on" and run.training.precision.dtype == "fp32":
        yield Finding(
            "speedups.flash_attention",
            "flash-attn computes in bf16 and fp16 only, and this run is in fp32; use precision: bfloat16, or "
            "flash_attention: auto",
        )


_SCORES = "training.checkpoint_activations.scores"
_TRITON_THETAS = "megatron.kernels.pattention.triton_thetas"


def _loss_of_a_teacher(run: RunConfig) -> Iterator[Finding]:
    if run.distillation is not None and run.speedups.fused_cross_entropy == "on":
        yield Finding(
            "speedups.fused_cross_entropy", "the divergence from a teacher is one of whole logits; use auto or off"
        )


def _pattention(run: RunConfig) -> Iterator[Finding]:
    choice, tokens = run.speedups.pattention, run.model.param_tokens
    if choice == "reference" and run.parallel.model_parallel_size > 1:
        yield Finding(
            "speedups.pattention",
            f"the reference needs all parameter tokens on one rank, and model_parallel_size is "
            f"{run.parallel.model_parallel_size}; use eager",
        )
    if choice == "reference" and run.training.checkpoint_activations.scores:
        yield Finding(_SCORES, "the reference keeps all its scores; use eager")
    if tokens is None:
        asked = {"speedups.pattention": choice != "auto", _SCORES: run.training.checkpoint_activations.scores}
        for path, is_asked in asked.items():
            if is_asked:
                yield Finding(path, f"architecture {run.model.architecture} has no Pattention; leave it out")
    elif choice == "triton" and tokens.theta not in (known := variant_names(_TRITON_THETAS)):
        yield Finding(
            "speedups.pattention",
            f"norm_activation_type {tokens.theta} has no formulas in Triton, only {', '.join(known)} have; use auto, "
            "eager or compile",
        )


def _profiled_steps(run: RunConfig) -> Iterator[Finding]:
    profile, last = run.monitor.profile, run.training.train_iters
    if not profile.enabled:
        if profile.memory:
            yield Finding("monitor.profile.memory", "needs profile: true, whose steps it is for")
        return
    if profile.step_stop < profile.step_start:
        yield Finding(
            "monitor.profile.step_stop", f"is before profile_step_start {profile.step_start}; use that step or later"
        )
    if profile.step_start > last:
        yield Finding("monitor.profile.step_start", f"the run ends with step {last} (train_iters); use an earlier one")


def _evaluation_output(run: RunConfig) -> Iterator[Finding]:
    evaluation = run.evaluation
    if evaluation.iterations != "all" and len(evaluation.iterations) > 1 and evaluation.output.endswith(".json"):
        yield Finding("evaluation.output", "several checkpoints do not go into one .json file; name a folder")


def _prompts(run: RunConfig) -> Iterator[Finding]:
    if run.generation.text_gen_type == "input-file" and run.generation.sample_input_file is None:
        yield Finding("generation.text_gen_type", "needs sample_input_file")
    if (run.generation.text_gen_type == "prompt") != (run.generation.prompt is not None):
        yield Finding(
            "generation.prompt", "goes with `text_gen_type: prompt`, which it implies where the type is not given"
        )
    files = run.generation.sample_input_file, run.generation.sample_output_file
    if None not in files and len({str(Path(str(file)).resolve()) for file in files}) == 1:
        yield Finding("generation.sample_output_file", "would overwrite the prompts; name another file")
    if run.generation.text_gen_type == "interactive" and run.generation.return_logits:
        yield Finding("generation.return_logits", "a terminal has no room for logits; use text_gen_type: input-file")


LAYOUT_CHECKS = (
    _heads,
    _key_value_heads,
    _tensor_parallel_sizes,
    _tensor_parallel_vocabulary,
    _pipeline_stages,
    _pattention,
)
"""Checks that depend on the sizes of the parallel groups."""


def fits_together(run: RunConfig) -> bool:
    """Tells whether the model splits over the configured sizes of the parallel groups."""
    return not any(True for check in LAYOUT_CHECKS for _ in check(run))


CHECKS: tuple[Callable[[RunConfig], Iterator[Finding]], ...] = (
    _heads,
    _key_value_heads,
    _activation,
    _rotary_dimensions,
    _positions,
    _padded_vocabulary,
    _fixed_by_architecture,
    _tensor_parallel_sizes,
    _param_token_groups,
    _tensor_parallel_vocabulary,
    _parameters_are_countable,
    _file_names,
    _pipeline_stages,
    _batch_is_given,
    _batch_divides,
    _samples_are_countable,
    _optimizer_values,
    _smallest_learning_rate,
    _one_schedule,
    _wsd_schedule,
    _split,
    _one_kind_of_dataset,
    _dataset_lists,
    _optimizer_switches,
    _tokenizer_files,
    _checkpoint_steps,
    _checkpoint_to_load,
    _flash_attention,
    _pattention,
    _loss_of_a_teacher,
    _profiled_steps,
    _evaluation_output,
    _prompts,
)
