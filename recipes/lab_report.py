def html(r, t):
    return ""
