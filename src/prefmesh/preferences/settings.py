"""What a config says about preferences: where they come from and how they are spread over agents."""

from typing import Any, Literal

from pydantic import Field, field_validator

from prefmesh.preferences.town import TownSettings
from prefmesh.settings import Settings

PresetName = Literal["hh", "shp", "ultrafeedback", "prism"]
Partition = Literal["by_user", "iid", "dirichlet", "size_skewed"]
Info = Any
"""pydantic's `ValidationInfo`, a protocol that cannot be checked at run time."""


class ColumnSettings(Settings):
    """Which column of the source holds what. `prompt: null`: the prompt is the common beginning of both sides."""

    prompt: str | None = "prompt"
    """The prompt's column; null: there is none, the prompt is the common beginning of both sides."""
    chosen: str = Field(default="chosen", validate_default=True)
    """The preferred completion's column."""
    rejected: str = Field(default="rejected", validate_default=True)
    """The other completion's column."""
    user: str = Field(default="user", validate_default=True)
    """The column that says whose preference it is; agents are made from it."""

    @field_validator("chosen", "rejected", "user")
    @classmethod
    def _distinct(cls, name: str, info: Info) -> str:
        taken = {value: key for key, value in info.data.items() if value is not None}
        if name in taken:
            raise ValueError(f"the column {name!r} is already the one of {taken[name]!r}; each needs its own")
        return name


RANK = "{rank}"


class PreferencesSettings(Settings):
    """Where the pairs come from (`source` to `where`), and which agent holds which of them (`partition` on).

    An option that would do nothing is refused rather than ignored.
    """

    source: str = "builtin:town"
    """A file (.jsonl, .csv, either also with .gz; .parquet), `builtin:town`, or a dataset's id on the hub."""
    shared: bool = Field(default=True, validate_default=True)
    """Several processes: whether all read the same source. `false`: each reads its own and knows no more of the others' than how many pairs their agents have; `{rank}` in `source` stands for its number, and `agents` is what each has."""
    preset: PresetName | None = None
    """The schema of a known dataset. Chosen by itself for that dataset's id; to be named for a local file of it."""
    subset: str | None = None
    """Hub: the dataset's configuration (for hh: its directory, such as `harmless-base`, which names the user)."""
    split: str | None = None
    """Hub: `train` where nothing else is said (ultrafeedback: `train_prefs`)."""
    columns: ColumnSettings = ColumnSettings()
    """Names of the columns, where they are not TRL's."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """`refuse`: the first bad row ends the command; `skip`: bad rows are dropped, counted and reported."""
    limit: int | None = Field(default=None, ge=1)
    """Stop after so many pairs, in the source's order."""
    min_pairs: int = Field(default=1, ge=1)
    """Users with fewer pairs are left out."""
    where: dict[str, str] | None = None
    """Keep only rows whose column equals the value, such as `{user: harmless}`."""

    partition: Partition = "by_user"
    """`by_user`: an agent holds whole users; `iid`: a random part of the pool; `dirichlet`: labels in drawn proportions; `size_skewed`: random parts of unequal size."""
    agents: int | None = Field(default=None, ge=1)
    """None: as many agents as users."""
    alpha: float | None = Field(default=None, gt=0, validate_default=True)
    """`dirichlet`: concentration; large is like `iid`, small gives each agent few labels."""
    column: str | None = None
    """`dirichlet`: the column whose values are the labels; None: the user."""
    size_exponent: float | None = Field(default=None, ge=0, validate_default=True)
    """`size_skewed`: the k-th largest agent holds a share proportional to k^-size_exponent; 0 is `iid`."""

    @field_validator("source")
    @classmethod
    def _known_builtin(cls, source: str) -> str:
        if not source:
            raise ValueError("empty; allowed: a file, builtin:town, or a dataset's id")
        if source.startswith("builtin:") and source != "builtin:town":
            raise ValueError(f"unknown {source!r}; the only one is builtin:town")
        return source

    @field_validator("shared")
    @classmethod
    def _of_its_own(cls, shared: bool, info: Info) -> bool:
        source = info.data.get("source", "")
        if not shared and source == "builtin:town":
            raise ValueError(
                "every process would build the same town; allowed with false: a file or a dataset"
            )
        if shared and RANK in source:
            raise ValueError(f"preferences.source has {RANK}, but all processes share it; allowed: false")
        return shared

    @field_validator("preset", "subset", "split", "columns", "on_bad_row")
    @classmethod
    def _reads_something(cls, value: object, info: Info) -> object:
        assert info.field_name is not None
        default = cls.model_fields[info.field_name].default
        if info.data.get("source") == "builtin:town" and value != default:
            raise ValueError("concerns files and datasets; preferences.source is builtin:town")
        return value

    @field_validator("columns")
    @classmethod
    def _columns_without_preset(cls, columns: ColumnSettings, info: Info) -> ColumnSettings:
        if info.data.get("preset") is not None and columns != ColumnSettings():
            raise ValueError(
                f"the preset {info.data['preset']!r} names the columns itself; leave one of the two out"
            )
        return columns

    @field_validator("alpha", "size_exponent")
    @classmethod
    def _number_of_its_partition(cls, value: float | None, info: Info) -> float | None:
        owner = {"alpha": "dirichlet", "size_exponent": "size_skewed"}[str(info.field_name)]
        partition = info.data.get("partition", owner)
        if partition == owner and value is None and "partition" in info.data:
            raise ValueError(f"needed by partition: {owner}, such as {info.field_name}: 0.5")
        if partition != owner and value is not None:
            raise ValueError(f"only partition: {owner} uses it; preferences.partition is {partition}")
        return value

    @field_validator("column")
    @classmethod
    def _column_of_dirichlet(cls, value: str | None, info: Info) -> str | None:
        partition = info.data.get("partition", "dirichlet")
        if value is not None and partition != "dirichlet":
            raise ValueError(f"only partition: dirichlet uses it; preferences.partition is {partition}")
        return value

    town: TownSettings | None = Field(default=None, validate_default=True)
    """The built-in town's residents; None: as many as agents, or the default, and everything else by default."""

    @field_validator("town")
    @classmethod
    def _town_of_the_town(cls, town: TownSettings | None, info: Info) -> TownSettings | None:
        if town is not None and info.data.get("source") != "builtin:town":
            raise ValueError(
                f"only source: builtin:town uses it; preferences.source is {info.data.get('source')}"
            )
        return town

    @property
    def simulated(self) -> bool:
        """Whether the pairs come from the built-in town, whose residents' utilities are known."""
        return self.source == "builtin:town"

    @property
    def town_settings(self) -> TownSettings:
        """The town, with one resident per agent where nothing else is said."""
        if self.town is not None:
            return self.town
        return TownSettings(users=self.agents) if self.agents else TownSettings()

    def of_process(self, rank: int) -> "PreferencesSettings":
        """As that process reads them."""
        return self.model_copy(update={"source": self.source.replace(RANK, str(rank))})

    def source_key(self) -> str:
        """What the pairs themselves depend on, apart from the run's seed (not how they are dealt to agents)."""
        dealt = {"agents", "partition", "alpha", "column", "size_exponent", "town"}
        town = self.town_settings.model_dump_json() if self.simulated else ""
        return self.model_dump_json(exclude=dealt) + town
