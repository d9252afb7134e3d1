"""Players that seek: a frame in the midst of a file is the one that the local file has there."""

from pathlib import Path

import pytest

from tests.clients.running import Transport, digest, run

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("container", ["mp4", "mkv"])]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a video of 20 seconds in each container: an mp4's index is at its end."""
    directory = tmp_path_factory.mktemp("videos")
    picture = ["-f", "lavfi", "-i", "testsrc2=size=320x240:rate=25:duration=20"]
    run(["ffmpeg", "-v", "error", *picture, "-c:v", "mpeg4", "-q:v", "1", "-g", "25", "video.mp4"], directory)
    run(["ffmpeg", "-v", "error", "-i", "video.mp4", "-c", "copy", "video.mkv"], directory)
    assert (directory / "video.mp4").read_bytes().find(b"moov") > 1 << 20
    return directory


def _frame(source: str, directory: Path, *options: str) -> str:
    command = ["ffmpeg", "-v", "error", "-y", *options, "-ss", "15", "-i", source, "-frames:v", "1"]
    run([*command, "-f", "rawvideo", "frame"], directory)
    return digest(directory / "frame")


def test_ffmpeg_finds_a_frame(container: str, transport: Transport, videos: Path, tmp_path: Path) -> None:
    name = f"video.{container}"
    url = transport.put(name, (videos / name).read_bytes())
    trusting = transport.trusting("-tls_verify", "1", "-ca_file", "{}")
    assert _frame(url, tmp_path, *trusting) == _frame(str(videos / name), tmp_path)
    transport.wait_for_answers(name, 206, 2)
    show = ["ffprobe", "-v", "error", "-show_entries", "format=duration,size", "-of", "csv=p=0"]
    assert run([*show, *trusting, url], tmp_path) == run([*show, videos / name], tmp_path)


def _picture(source: str, directory: Path, *options: str) -> str:
    command = ["mpv", "--no-config", "--no-audio", "--really-quiet", "--vo=image", "--vo-image-format=png"]
    command += [f"--vo-image-outdir={directory}", "--start=15", "--frames=1", *options, source]
    run(command, directory)
    return digest(directory / "00000001.png")


def test_mpv_starts_in_the_midst(container: str, transport: Transport, videos: Path, tmp_path: Path) -> None:
    name = f"video.{container}"
    url = transport.put(name, (videos / name).read_bytes())
    trusting = transport.trusting("--tls-verify=yes", "--tls-ca-file={}")
    assert _picture(url, tmp_path, *trusting) == _picture(str(videos / name), tmp_path)
    transport.wait_for_answers(name, 206, 2)
