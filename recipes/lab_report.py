def html(results: dict, tables: list) -> str:
    return ""
