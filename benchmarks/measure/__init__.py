"""From a plan of cases to records: checked, timed, resumed; and looks into single calls."""
