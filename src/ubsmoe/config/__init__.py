"""Run files: what they can say (`settings`) and how they are read (`reading`)."""

from ubsmoe.config.data import DataSettings, PartitionSettings, SyntheticSettings
from ubsmoe.config.model import AdapterSettings, ModelSettings, TierSettings
from ubsmoe.config.reading import (
    MAIN_KEY,
    ConfigError,
    load_run,
    parse_run,
    parse_table,
    parse_value,
    read_toml,
    to_json,
    validated,
    with_overrides,
)
from ubsmoe.config.section import Settings
from ubsmoe.config.secure import SecureAggregationSettings
from ubsmoe.config.settings import (
    ClientSettings,
    EvaluateSettings,
    MethodSettings,
    PrivacySettings,
    RobustSettings,
    RoundSettings,
    RunSettings,
    SimulationSettings,
    TrainSettings,
    WireSettings,
    train_of_tier,
)
from ubsmoe.costs.workload import ExpertFormat, NamedFormat, WireDtype, format_named

__all__ = [
    "MAIN_KEY",
    "AdapterSettings",
    "ClientSettings",
    "ConfigError",
    "DataSettings",
    "EvaluateSettings",
    "ExpertFormat",
    "MethodSettings",
    "ModelSettings",
    "NamedFormat",
    "PartitionSettings",
    "PrivacySettings",
    "RobustSettings",
    "RoundSettings",
    "RunSettings",
    "SecureAggregationSettings",
    "Settings",
    "SimulationSettings",
    "SyntheticSettings",
    "TierSettings",
    "TrainSettings",
    "WireDtype",
    "WireSettings",
    "format_named",
    "load_run",
    "parse_run",
    "parse_table",
    "parse_value",
    "read_toml",
    "to_json",
    "train_of_tier",
    "validated",
    "with_overrides",
]
