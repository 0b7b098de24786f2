import base64
import hashlib
import re
from pathlib import Path

from switchlm.report.write import ReportRun, write_report
from switchlm.serving.middleware import page_files, page_headers


def test_every_file_named_by_the_page_exists():
    found = page_files()
    assert found["/"].headers["content-type"] == "text/html; charset=utf-8"
    text = found["/"].body.decode()
    named = set(re.findall(r'(?:src|href)="(page/[^"]+)"', text))
    for file in found.values():
        named |= {f"page/{name}" for name in re.findall(r'from "\./(.+?)"', file.body.decode())}
    assert {f"/{name}" for name in named} | {"/"} == set(found)


def test_files_are_short():
    for file in page_files().values():
        assert file.body.count(b"\n") <= 400


def test_nothing_is_loaded_from_other_origins_and_no_html_is_inserted():
    for address, file in page_files().items():
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "http://", "https://",
                          "eval(", "localStorage", "sessionStorage"):  # fmt: skip
            assert forbidden not in file.body.decode(), f"{address} has {forbidden}"


def test_scripts_of_a_report_are_allowed_by_hash_and_no_other_inline_scripts(tmp_path):
    assert "script-src 'self';" in page_headers()["Content-Security-Policy"]
    path = Path(tmp_path) / "report.html"
    write_report(path, title="a", headline="b", runs=[ReportRun(name="a", metrics=[])])
    text = path.read_text("utf-8")
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = page_headers(text)["Content-Security-Policy"]
    assert f"script-src 'self' 'sha256-{digest}';" in policy
