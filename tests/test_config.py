"""Settings: precedence, types, and errors that help."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jdpo.cli.commands.answers import generate, pair
from jdpo.cli.commands.clusters import plan
from jdpo.cli.commands.runs import export, inspect, quickstart, train
from jdpo.config import (
    FREE_KEYS,
    DatasetConfig,
    DPOConfig,
    LoraConfig,
    MeshConfig,
    SFTConfig,
    differences,
    keys_of,
    load_config,
    to_dict,
    to_public_yaml,
    to_yaml,
)
from jdpo.config.foreign_keys import FOREIGN, OTHER_COMMANDS, RENAMED, VALUES
from jdpo.iteration.loop_settings import LoopSettings

REQUIRED = ["model_name_or_path=m", "datasets=rows.jsonl", "output_dir=out"]


def dpo(*words: str, path: Path | None = None) -> DPOConfig:
    return load_config(DPOConfig, path, [*REQUIRED, *words])


@pytest.mark.smoke
def test_command_line_beats_yaml_beats_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("beta: 0.3\nlearning_rate: 5e-7\nmesh: {tensor: 2}\n")
    config = dpo("--beta", "0.2", "mesh.fsdp=4", path=path)
    assert (config.beta, config.learning_rate, config.max_length) == (0.2, 5e-7, 1024)
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (1, 4, 2)


@pytest.mark.parametrize("words", [["--beta", "0.2"], ["--beta=0.2"], ["beta=0.2"]])
def test_three_ways_to_override(words: list[str]) -> None:
    assert dpo(*words).beta == 0.2


def test_dashes_negative_numbers_and_bare_flags() -> None:
    config = dpo("--mesh.fsdp", "-1", "--load-best-model-at-end", "--shuffle", "false")
    assert config.mesh.fsdp == -1
    assert config.load_best_model_at_end is True
    assert config.shuffle is False


def test_datasets_take_one_path_or_a_list() -> None:
    assert dpo().datasets[0].path == "rows.jsonl"
    assert dpo("datasets=[a.jsonl, {path: b, split: test}]").datasets[1].split == "test"


def test_resolved_yaml_reads_back_to_the_same_config(tmp_path: Path) -> None:
    config = dpo("learning_rate=5e-7", "eval_datasets=[{path: x, split: 'train[:5%]'}]", "report_to=wandb")
    path = tmp_path / "resolved_config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(DPOConfig, path) == config
    assert set(yaml.safe_load(path.read_text())) == {key for key in keys_of(DPOConfig) if "." not in key}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bta=0.2", "unknown key 'bta' on the command line; did you mean 'beta'?"),
        ("pref_beta=0.2", "unknown key 'pref_beta' on the command line; here it is called 'beta'"),
        ("mesh.fdsp=2", "unknown key 'mesh.fdsp' on the command line; did you mean 'mesh.fsdp'?"),
        ("weight_decay=1", "here it is called 'optimizer.weight_decay'"),
        ("pref_beta=0.2", "here it is called 'beta': `--beta 0.2`"),
        ("optim=adamw_torch", "here it is called 'optimizer.name': `--optimizer.name adamw`"),
        ("bf16=true", "unknown key 'bf16' on the command line; here it is `--compute_dtype bfloat16`"),
        ("--bf16", "here it is `--compute_dtype bfloat16`"),
        ("bf16=false", "here it is `--compute_dtype float32`"),
        ("fp16=true", "here it is `--compute_dtype bfloat16` (float16 would need loss scaling"),
        ("fp16=false", "leave it out"),
        ("load_in_4bit=true", "here it is `--lora.base_dtype int8` (int8 is the smallest"),
        ("use_peft=true", "here it is `--lora true`"),
        ("lora_r=8", "here it is called 'lora.r': `--lora.r 8`"),
        ("lora_target_modules=[q_proj, v_proj]", "`--lora.target_modules [q_proj, v_proj]`"),
        ("lora_target='q_proj,v_proj'", "`--lora.target_modules [q_proj,v_proj]`"),
        ("lora_target=all", "`--lora.target_modules all-linear`"),
        ("bf16='true'", "here it is `--compute_dtype bfloat16`"),
        ("report_to=none", "here it is `--report_to []`"),
        ("wandb_project=mine", "here it is called 'run_project': `--run_project mine`"),
        ("trackio_space_id=me/x", "set TRACKIO_SPACE_ID in the environment"),
        ("per_device_train_batch_size=4", "here it is `--micro_batch_size 4` (global_batch_size counts rows per"),
        ("gradient_accumulation_steps=8", "the nearest key is 'global_batch_size' (global_batch_size counts"),
        ("gradient_checkpointing=true", "here it is `--remat full`"),
        ("precompute_ref_log_probs=true", "here it is `--reference cached`"),
        ("deepspeed=zero3.json", "jdpo has no such key: devices are laid out by `mesh`"),
        ("assistant_only_loss=true", "loss_on"),
        ("lora.bias=none", "biases stay frozen under lora"),
        ("datasets=[{path: x, subset: en}]", "here it is called 'datasets.name': `name: en`"),
        ("datasets=[{path: x, type: chatml}]", "the columns tell the format; column_map renames them"),
        ("optimizer=paged_adamw_8bit", "here it is `--optimizer.name adamw_bf16`"),
        ("max_steps=-1", "here it is `--max_steps null`"),
        ("compute_dtype=bf16", "here it is `--compute_dtype bfloat16`"),
        ("rows=3", "unknown key 'rows' on the command line; it is an option of `jdpo inspect`"),
        ("dry_run=true", "it is an option of `jdpo dpo` and `jdpo sft`"),
        ("--dryrun", "did you mean `--dry_run`, an option of `jdpo dpo` and `jdpo sft`?"),
        ("--print-conifg", "did you mean `--print_config`"),
        ("--beta", "--beta needs a value: Strength of the pull"),
        ("--output_dir", "--output_dir needs a value: Folder for everything"),
        ("beta=", "--beta needs a value"),
        ("output_dir=", "--output_dir needs a value"),
        ("--mesh.fsdp", "--mesh.fsdp needs a value"),
        ("qqqqqq=1", "unknown key 'qqqqqq' on the command line; `--help` lists the keys"),
        ("beta=strong", "'beta' on the command line is 'strong': expected a number greater than 0 (Strength of"),
        ("beta=true", "'beta' on the command line is true: expected a number"),
        ("beta=0", "'beta' on the command line is 0: expected a number greater than 0"),
        ("learning_rate=.nan", "'learning_rate' on the command line is nan"),
        ("learning_rate=.inf", "is inf: expected a finite number"),
        ("max_length=10.5", "'max_length' on the command line is 10.5: expected a whole number of at least 1"),
        ("compute_dtype=fp8", "expected auto, float32, bfloat16 or float64"),
        ("mesh=3", "'mesh' on the command line is 3: expected a group of keys such as {fsdp: 4, tensor: 2}"),
        ("optim=lion", "here it is called 'optimizer.name'"),
        (
            "optimizer=adam",
            "'optimizer.name' on the command line is 'adam': expected adamw, adamw_bf16, adafactor, lion or sgd",
        ),
        ("lora.target_modules=5", "'lora.target_modules' on the command line is 5: expected a text or a list"),
        ("loss_weights=[1, -2]", "is -2: expected a list whose entries are at least 0"),
        ("packing=maybe", "is 'maybe': expected true or false"),
        ("compiler_options=[xla_x]", "'compiler_options' on the command line is ['xla_x']: expected a map of keys"),
        (
            "compiler_options={xla_x: {a: 1}}",
            "'compiler_options.xla_x' on the command line is {'a': 1}: expected a single",
        ),
        ("optimizer={name: sgd, b1: 0.9}", "b1 0.9 has no effect: sgd uses momentum"),
        ("optimizer.b1=1", "'optimizer.b1' on the command line is 1: expected a number of at least 0 and less than 1"),
        ("datasets=[{pth: x}]", "missing key 'datasets.0.path' (JSON, JSONL, CSV, Parquet or Arrow file"),
    ],
)
def test_errors_name_key_value_place_and_what_is_expected(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dpo(word)


TEXT_KEYS = [
    key for key in keys_of(DPOConfig) if key.split(".")[-1] in (
        "model_name_or_path", "output_dir", "model_revision", "chat_template", "cache_dir", "metric_for_best_model",
        "max_shard_size", "push_to_hub", "profile_steps", "reference_model", "reference_revision", "adapter", "path",
        "split", "revision", "label",
    )
]  # fmt: skip


@pytest.mark.parametrize("empty", ["", "  "])
@pytest.mark.parametrize("key", TEXT_KEYS)
def test_an_empty_text_is_refused_as_a_missing_one_wherever_it_comes_from(key: str, empty: str, tmp_path: Path) -> None:
    group, _, inner = key.partition(".")
    value = {"path": "x", inner: empty} if inner else empty
    path = tmp_path / "run.yaml"
    required = {"model_name_or_path": "m", "datasets": "rows.jsonl", "output_dir": "out"}
    path.write_text(yaml.safe_dump(required | {group: [value] if group.endswith("datasets") else value}))
    named = f"{group}.0.{inner}" if group.endswith("datasets") else key
    if group == "lora":
        path.write_text(yaml.safe_dump(required | {"lora": {inner: empty}}))
    with pytest.raises(ValueError, match=rf"missing value of key '{named}' in {path}: it is empty"):
        load_config(DPOConfig, path)
    if not inner:
        with pytest.raises(ValueError, match="it is empty" if empty else f"--{key} needs a value"):
            dpo(f"--{key}", empty)


@pytest.mark.parametrize("cls", [DPOConfig, SFTConfig, DatasetConfig, LoraConfig])
def test_no_key_that_takes_text_was_forgotten(cls: type) -> None:
    hints = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    assert [name for name, hint in hints.items() if hint in ("str", "str | None")] == []
    assert any(hint.startswith("Text") for hint in hints.values())


@pytest.mark.parametrize("words", [["", "out"], ["run", " "], ["run", "out", "--push_to_hub", ""]])
def test_export_refuses_empty_paths(words: list[str]) -> None:
    with pytest.raises(ValueError, match="it is empty"):
        export.main("export", words)


@pytest.mark.parametrize("words", [["--output_dir", ""], ["--output_dir"], ["output_dir= "]])
def test_quickstart_refuses_an_empty_path(words: list[str]) -> None:
    with pytest.raises(ValueError, match="--output_dir needs a value"):
        quickstart.read_settings(words)


def test_suggestions_for_foreign_keys_of_a_file_are_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("bf16: true\nlora_r: 8\noptim: adamw_torch\nbeta:\nlearning_rate: 1e-6\n")
    with pytest.raises(ValueError, match="unknown key") as error:
        dpo(path=path)
    assert str(error.value).splitlines() == [
        f"'beta' in {path} has no value: expected a number greater than 0 "
        "(Strength of the pull towards the reference: the higher, the closer it stays)",
        f"unknown key 'bf16' in {path}; here it is `compute_dtype: bfloat16`",
        f"unknown key 'lora_r' in {path}; here it is called 'lora.r': `lora: {{r: 8}}`",
        f"unknown key 'optim' in {path}; here it is called 'optimizer.name': `optimizer: {{name: adamw}}`",
    ]


@pytest.mark.parametrize(
    ("name", "advice"), [("dop", "did you mean 'dpo' (another name of sigmoid)?"), ("hing", "'hinge'?")]
)
def test_an_unknown_loss_is_named_with_the_nearest(name: str, advice: str) -> None:
    with pytest.raises(ValueError, match=f"unknown loss_type '{name}'") as error:
        dpo(f"loss_type=[sft, {name}]")
    assert advice in str(error.value)


def test_a_foreign_key_that_supplies_a_missing_one_is_the_only_fault() -> None:
    with pytest.raises(ValueError, match="unknown key") as error:
        load_config(DPOConfig, None, ["base_model=m", "dataset=rows.jsonl", "output_dir=out", "bta=1"])
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert not any(line.startswith("missing") for line in lines)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("lora_r: 8\nlora_alpha: 16\nlora_target: all", "`lora: {r: 8, alpha: 16, target_modules: all-linear}`"),
        ("use_peft: true\nlora_r: 8", "`lora: {r: 8}`"),
        ("use_peft: true\nfinetuning_type: lora", "`lora: true`"),
        ("optim: adamw_torch\nweight_decay: 0.1", "`optimizer: {name: adamw, weight_decay: 0.1}`"),
    ],
)
def test_foreign_keys_of_one_group_get_one_suggestion(text: str, advice: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="unknown keys") as error:
        dpo(path=path)
    (line,) = str(error.value).splitlines()
    assert line.endswith(f"here they are {advice}")
    assert all(f"'{key.partition(':')[0]}'" in line for key in text.splitlines())
    with pytest.raises(ValueError, match="unknown keys") as error:
        dpo(*text.replace(": ", "=").splitlines())
    assert str(error.value).count("unknown key") == 1


def test_a_key_of_the_other_command_says_which() -> None:
    with pytest.raises(ValueError, match="unknown key 'beta' on the command line"):
        load_config(SFTConfig, None, [*REQUIRED, "beta=0.1"])
    with pytest.raises(ValueError, match="`jdpo dpo` has it as 'beta'"):
        load_config(SFTConfig, None, [*REQUIRED, "pref_beta=0.1"])


def test_tables_of_foreign_keys_name_existing_keys_and_accepted_values() -> None:
    known = {**keys_of(DPOConfig), **keys_of(SFTConfig)}
    assert not (set(RENAMED) | set(FOREIGN)) & set(known)
    assert {*RENAMED.values(), *VALUES} <= set(known)
    assert {entry.key for entry in FOREIGN.values()} - {None} <= set(known)
    settings = [(entry.key, value) for entry in FOREIGN.values() for value in entry.values.values()]
    settings += [(key, value) for key, values in VALUES.items() for value in values.values()]
    tried = {(key, value) for key, value in settings if key and value not in ("*", None)}
    for key, value in tried:
        cls = DPOConfig if key in keys_of(DPOConfig) else SFTConfig
        extra = ["lora=true"] if key.startswith("lora.") else []
        load_config(cls, None, [*REQUIRED, *extra, f"{key}={value}"])
    assert len(tried) > 30


def test_options_of_other_commands_are_named() -> None:
    parsers = {"inspect": inspect.parser(), "quickstart": quickstart.parser(), "export": export.parser()}
    parsers |= {"pair": pair.parser(), "generate": generate.parser(), "plan": plan.parser()}
    parsers["dpo` and `jdpo sft"] = train.parser("dpo")
    options = {command: parser.format_help() for command, parser in parsers.items()}
    for option, command in OTHER_COMMANDS.items():
        assert re.search(rf"--{option}\b", options[command]), option


@pytest.mark.parametrize("words", [["loss_type=dpo"], ["loss_type=[dpo, sft]"]])
def test_the_loss_called_dpo_is_sigmoid_and_says_so(words: list[str]) -> None:
    lines: list[str] = []
    config = load_config(DPOConfig, None, [*REQUIRED, *words], log=lines.append)
    assert config.loss_type[0] == "sigmoid"
    assert lines == ["loss_type: dpo means sigmoid"]


def test_switches_need_no_value() -> None:
    config = dpo("--lora", "--load_best_model_at_end", "--lora.merge", "--lora.use_rslora")
    assert isinstance(config.lora, LoraConfig)
    assert config.lora.merge
    assert config.lora.use_rslora


def test_target_modules_of_the_command_line_are_a_list_or_a_name() -> None:
    lora = dpo("--lora.target_modules", "[q_proj, v_proj]").lora
    assert isinstance(lora, LoraConfig)
    assert lora.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize("name", ["0123", "2024-01-01", "on", "1e5", "a: b"])
def test_text_on_the_command_line_stays_as_it_is(name: str) -> None:
    config = dpo(f"output_dir={name}", f"--model_revision={name}", "chat_template=null")
    assert (config.output_dir, config.model_revision, config.chat_template) == (name, name, None)


def test_differences_are_written_as_in_yaml_without_defaults() -> None:
    saved = to_dict(dpo("lora=true", "datasets=[{path: a.jsonl, weight: 2.0}]"))
    assert differences(saved, dpo("lora.r=8", "datasets=b.jsonl")) == [
        "lora: true before, {r: 8} now",
        "datasets: [{path: a.jsonl, weight: 2.0}] before, [{path: b.jsonl}] now",
    ]
    assert differences(saved, dpo("datasets=[{path: a.jsonl, weight: 2.0}]")) == ["lora: true before, null now"]


def test_a_key_unknown_to_an_older_version_is_no_difference() -> None:
    saved = to_dict(dpo())
    del saved["label_smoothing"]
    assert differences(saved, dpo()) == []
    assert differences(saved, dpo("label_smoothing=0.1")) == ["label_smoothing: 0.0 before, 0.1 now"]


def test_spellings_of_one_optimizer_are_equal() -> None:
    saved = {**to_dict(dpo()), "optimizer": {"name": "adamw", "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}}
    assert differences(saved, dpo()) == []
    assert differences(saved, dpo("optimizer.b2=0.999", "offload_optimizer=true")) == []
    assert len(differences(saved, dpo("optimizer.b2=0.99"))) == 1
    assert len(differences({**saved, "optimizer": {**saved["optimizer"], "b1": 0.8}}, dpo())) == 1
    assert len(differences(saved, dpo("optimizer=adamw_bf16"))) == 1


def test_a_name_on_the_command_line_changes_only_the_rule(tmp_path: Path) -> None:
    """Holds whether the file or the command line has the whole group, and the other the bare name."""
    for text in ("optimizer: {name: adamw, b2: 0.98, weight_decay: 0.1}", "optimizer: adamw"):
        (tmp_path / "run.yaml").write_text(f"model_name_or_path: m\noutput_dir: o\ndatasets: d\n{text}\n")
        given = load_config(
            DPOConfig, tmp_path / "run.yaml", ["--optimizer", "lion", "--optimizer.b1", "0.8"]
        ).optimizer
        assert (given.name, given.b1) == ("lion", 0.8)
        assert (given.b2, given.weight_decay) == ((0.98, 0.1) if "{" in text else (None, 0.0))
    (tmp_path / "run.yaml").write_text("optimizer: {b2: 0.98}")
    with pytest.raises(ValueError, match=r"b2 0\.98 has no effect: sgd uses momentum"):
        load_config(DPOConfig, tmp_path / "run.yaml", ["--optimizer=sgd"])


def test_steps_to_profile_are_not_read_as_a_base_60_number(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\noutput_dir: o\ndatasets: d\nprofile_steps: 10:13\nmax_steps: 20\n")
    config = load_config(DPOConfig, path)
    assert (config.profile_steps, config.max_steps) == ("10:13", 20)


def test_a_dataset_is_identified_by_its_rows_not_by_its_name() -> None:
    saved = {**to_dict(dpo()), "datasets": [{"path": "rows.jsonl", "split": "train", "name": None, "revision": None}]}
    assert differences(saved, dpo()) == []
    assert differences(saved, dpo("datasets=[{path: rows.jsonl, label: mine}]", "dataset_num_proc=3")) == []
    assert len(differences(saved, dpo("datasets=[{path: rows.jsonl, num_rows: 9}]"))) == 1
    assert len(differences(saved, dpo("eval_fraction=0.1", "group_by_length=true"))) == 2


def test_an_optimizer_may_be_given_by_its_name_alone() -> None:
    lion = dpo("optimizer=lion").optimizer
    assert (lion.name, lion.settings) == ("lion", {"b1": 0.9, "b2": 0.99})
    assert dpo("optimizer.name=lion", "optimizer.b1=0.8").optimizer.settings == {"b1": 0.8, "b2": 0.99}


def test_a_plain_key_is_no_group() -> None:
    with pytest.raises(ValueError, match="'beta' is not a group of keys"):
        dpo("beta=0.1", "beta.deep=1")


def test_missing_keys_are_all_named() -> None:
    with pytest.raises(ValueError, match="missing key") as error:
        load_config(SFTConfig, complete=True)
    assert [line.split("'")[1] for line in str(error.value).splitlines()] == [
        "model_name_or_path",
        "output_dir",
        "datasets",
    ]


def test_rows_may_be_left_out_of_a_config_in_python_only() -> None:
    words = ["model_name_or_path=m", "output_dir=o"]
    assert load_config(DPOConfig, None, words).datasets == ()
    with pytest.raises(ValueError, match="missing key 'datasets'"):
        load_config(DPOConfig, None, words, complete=True)


def test_rows_in_the_folder_of_a_run_may_move_with_it() -> None:
    saved = to_dict(dpo("output_dir=runs/a", "datasets=runs/a/rows.jsonl"))
    assert differences(saved, dpo("output_dir=b", "datasets=b/rows.jsonl")) == []
    assert len(differences(saved, dpo("output_dir=b", "datasets=runs/a/rows.jsonl"))) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 1\nbeta: 2\n", "the key 'beta' is written twice"),
        ("- a\n- b\n", "expected 'key: value' lines, found a list"),
        ("beta: [1\n", "is not YAML"),
    ],
)
def test_bad_yaml_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        dpo(path=path)
    assert str(path) in str(error.value)


def test_missing_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config file at"):
        dpo(path=tmp_path / "none.yaml")


def test_words_that_are_not_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot read 'beta'"):
        load_config(DPOConfig, None, ["beta", "0.2"])


def test_differences_name_what_makes_another_run() -> None:
    saved = to_dict(dpo())
    assert differences(saved, dpo("logging_steps=3", "mesh.data=2", "micro_batch_size=1", "eval_steps=5")) == []
    assert differences(saved, dpo("beta=0.2", "seed=1")) == ["beta: 0.1 before, 0.2 now", "seed: 42 before, 1 now"]


@pytest.mark.parametrize(
    ("word", "losses"),
    [
        ("loss_type=ipo", ("ipo",)),
        ("loss_type=[sigmoid, bco_pair,sft]", ("sigmoid", "bco_pair", "sft")),
    ],
)
def test_a_list_on_the_command_line_is_a_list(word: str, losses: tuple[str, ...]) -> None:
    assert dpo(word).loss_type == losses


def test_a_resumed_run_may_write_one_loss_as_a_list() -> None:
    config = dpo("loss_type=ipo")
    assert differences({**to_dict(config), "loss_type": "ipo"}, config) == []
    assert differences({**to_dict(config), "loss_type": "hinge"}, config) == ["loss_type: hinge before, [ipo] now"]


def test_every_key_is_described_and_free_keys_exist() -> None:
    for cls in (SFTConfig, DPOConfig):
        keys = keys_of(cls)
        assert all(keys.values()), [key for key, text in keys.items() if not text]
    assert set(keys_of(DPOConfig)) >= FREE_KEYS


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_shipped_configs_parse_and_open_with_their_command(path: Path) -> None:
    cls = LoopSettings if path.name == "iterate.yaml" else SFTConfig if "sft" in path.name else DPOConfig
    assert load_config(cls, path).output_dir
    assert path.read_text().startswith("#")


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("model_name_or_path=s3://KEY:hunter2@bucket/model", "model_name_or_path"),
        ("datasets=[rows.jsonl, {path: 'https://hunter2@host/rows.jsonl'}]", "datasets.1.path"),
        ("datasets=zip://a.csv::https://me:hunter2@host/a.zip", "datasets"),
        ("reference_model=sftp://me:hunter2@host/model", "reference_model"),
    ],
)
def test_passwords_in_addresses_are_refused_and_not_shown(word: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}': an address may not hold a password") as error:
        dpo(word)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("url", ["gs://bucket/runs/first", "s3://bucket/runs/first", "file:///data/first"])
def test_a_run_is_not_written_to_an_address(url: str) -> None:
    with pytest.raises(ValueError, match=rf"'output_dir'.*set `mirror: {url}`"):
        dpo(f"output_dir={url}")
    with pytest.raises(ValueError, match=r"'cache_dir'.*found an address"):
        dpo(f"cache_dir={url}")
    assert dpo(f"mirror={url}/").mirror == url


@pytest.mark.parametrize(
    ("mirror", "reason"),
    [
        ("runs/copy", "expected an address such as s3://"),
        ("s3://bucket", "expected a folder in a bucket, such as s3://bucket/runs/first"),
        ("gs://bucket/", "expected a folder in a bucket"),
        ("https://host/folder", "that can be written"),
        ("s3://KEY:hunter2@bucket/run", "may not hold a password"),
    ],
)
def test_a_mirror_is_a_folder_in_a_store(mirror: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"'mirror'.*{reason}") as error:
        dpo(f"mirror={mirror}")
    assert "hunter2" not in str(error.value)


def test_names_before_an_at_are_no_passwords() -> None:
    for address in ("abfs://container@account.dfs.core.windows.net/a", "sftp://me@host/a", "hf://datasets/a/b@main/c"):
        assert dpo(f"datasets={address}").datasets[0].path == address


def test_queries_are_neither_written_nor_compared() -> None:
    signed = dpo("datasets=https://host/rows.jsonl?X-Amz-Signature=SECRET", "cache_dir=why?")
    assert "SECRET" not in to_public_yaml(signed)
    assert "SECRET" in to_yaml(signed)
    saved = yaml.safe_load(to_public_yaml(signed))
    assert saved["datasets"][0]["path"] == "https://host/rows.jsonl"
    assert saved["cache_dir"] == "why?"
    assert differences(saved, signed) == []
    assert differences(saved, dpo("datasets=https://host/rows.jsonl?X-Amz-Signature=OTHER", "cache_dir=why?")) == []
    (line,) = differences(saved, dpo("datasets=https://host/other.jsonl?X-Amz-Signature=OTHER"))
    assert "OTHER" not in line


_LISTS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
_MERGES = "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a0: &a0 [x, x]\n" + _LISTS, "once its aliases are written out"),
        ("m0: &m0 {x: 1}\n" + _MERGES, "once its aliases are written out"),
        ("datasets: &d [*d]\n", "an alias of itself"),
        ("datasets: " + "[" * 20_000, "nested too deeply"),
        ("datasets: x\n" + "#" * 2**20, "characters, more than"),
        ("? [a]\n: b\n", "cannot be a key"),
        ("max_steps: 2024-99-99\n", "not YAML"),
    ],
)
def test_yaml_whose_aliases_expand_is_refused_with_the_file_named(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=reason) as caught:
        load_config(DPOConfig, path)
    assert str(path) in str(caught.value)


def test_aliases_and_merge_keys_of_a_plain_config_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model_name_or_path: m\noutput_dir: o\ndatasets: &rows [{path: a.jsonl}]\neval_datasets: *rows\n"
        "mesh: {<<: {data: 2}, tensor: 4}\n",
        encoding="utf-8",
    )
    config = load_config(DPOConfig, path)
    assert config.eval_datasets == config.datasets
    assert (config.mesh.data, config.mesh.tensor) == (2, 4)


def test_few_modules_take_the_whole_config() -> None:
    """Checks that other modules take the settings group that they read (docs/decisions/0011-settings-groups.md)."""
    package = Path(__file__).parent.parent / "jdpo"
    whole = re.compile("TrainConfig|DPOConfig|SFTConfig")
    # These plan, check and launch whole runs, whatever their settings are.
    of_whole_runs = {package / name for name in ("planning", "doctor", "launch")}
    files = (path for path in package.rglob("*.py") if not of_whole_runs & {*path.parents})
    named = [path for path in files if whole.search(path.read_text(encoding="utf-8"))]
    assert len(named) <= 12, sorted(map(str, named))


def test_python_gives_paths_as_they_are(tmp_path: Path) -> None:
    config = DPOConfig(model_name_or_path=tmp_path / "model", output_dir=tmp_path / "run", lora=True)
    assert (config.model_name_or_path, config.output_dir) == (str(tmp_path / "model"), str(tmp_path / "run"))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load_config(DPOConfig, str(tmp_path / "run.yaml")) == config
    for wrong in ("beta=0.2", {"beta": 0.2}):
        with pytest.raises(ValueError, match="list of words"):
            load_config(DPOConfig, tmp_path / "run.yaml", wrong)  # type: ignore[arg-type]


def test_constructors_explain_faults_as_load_config_does() -> None:
    given: dict[str, Any] = {"lr": 1, "max_step": 3, "beta": -1, "loss_type": "x", "lora": {"rank": 8}}
    with pytest.raises(ValueError, match="unknown loss_type") as caught:
        DPOConfig(model_name_or_path="m", output_dir="o", **given)
    message = str(caught.value)
    assert "pydantic" not in message
    assert "'beta' in the call is -1: expected a number greater than 0" in message
    # What to write is Python.
    for advice in ("`learning_rate=1`", "did you mean 'max_steps'?", '`lora={"r": 8}`'):
        assert advice in message
    with pytest.raises(ValueError, match="missing key 'output_dir'"):
        SFTConfig(model_name_or_path="m")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="'r' in the call is 0: expected"):
        LoraConfig(r=0)
    with pytest.raises(ValueError, match="by name"):
        MeshConfig(2)  # type: ignore[misc]
    with pytest.raises(ValueError, match="here it is called 'lora'"):  # an object that is no YAML
        DPOConfig(model_name_or_path="m", output_dir="o", peft_config=object())  # type: ignore[call-arg]
