"""A plan for the terminal."""

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from prefmesh.theory.planning import Plan


def plan_lines(plan: Plan) -> Group:
    """What is proposed, what it takes, what is guaranteed, and the reasons."""
    rows = Table(title=escape(f"plan for a loss of {plan.target:g}"), show_header=False, title_justify="left")
    for name, value in (
        ("settings", str(plan.setting)),
        ("rounds", f"{plan.rounds} ({plan.source}; forecast {plan.forecast_rounds})"),
        ("seconds", f"{plan.seconds:.4g}, {plan.round_seconds:.4g} a round"),
        ("bytes sent", f"{plan.bytes:.4g}"),
        ("guaranteed", _guaranteed(plan)),
        *(("because" if k == 0 else "", reason) for k, reason in enumerate(plan.reasons)),
    ):
        rows.add_row(name, escape(value))
    return Group(rows)


def check_lines(plan: Plan) -> Table | str:
    """The plan beside its neighbours."""
    if plan.check is None:
        return (
            "check: only the log-linear policy is simulated; run the plan's config and its neighbours to see"
        )
    title = (
        "check: the plan's own target was not reached with other seeds"
        if plan.check.excess is None
        else f"check: the plan takes {100 * plan.check.excess:.1f} % longer than the best of its neighbours"
    )
    rows = Table(title=title, title_justify="left")
    rows.add_column("settings")
    rows.add_column("seconds", justify="right")
    for setting, seconds in [(plan.setting, plan.check.plan), *plan.check.neighbours]:
        rows.add_row(escape(str(setting)), "not reached" if seconds is None else f"{seconds:.4g}")
    return rows


def _guaranteed(plan: Plan) -> str:
    found = plan.guaranteed
    return found.why if found.bound is None else f"{found.bound:.4g} ({found.why})"
