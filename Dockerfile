# The service: it lists a folder that is mounted at /data, or serves what the settings say, or else a demo.
#   docker build -t downloadview .
#   docker run --rm --read-only --cap-drop ALL -p 8000:8000 -v /srv/videos:/data:ro downloadview
# docs/howto/deploy.md has more. For an application of your own, see deploy/docker/app.Dockerfile.

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
COPY requirements/run.txt requirements/
RUN pip install --require-hashes --requirement requirements/run.txt
COPY pyproject.toml README.md LICENSE ./
COPY downloadview_async downloadview_async
RUN pip install --no-deps --no-build-isolation --no-index . && python -m compileall -q /opt/venv/lib
COPY app /srv/app
# what the demo makes at its first start is made here: the root file system may be read-only later
RUN cd /srv && python -m app.demo && python -m compileall -q app

FROM python:3.13-slim
COPY --from=build /opt/venv /opt/venv
COPY --from=build /srv/app /srv/app
COPY deploy/docker/entrypoint /usr/local/bin/entrypoint
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DOWNLOADVIEW_CONFIG=/srv/app/downloadview.toml \
    DOWNLOADVIEW_SERVER__HOST=0.0.0.0
WORKDIR /srv
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# bash is in the base image, and starts faster than Python
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/${DOWNLOADVIEW_SERVER__PORT:-8000} && printf 'GET /-/livez HTTP/1.0\\r\\n\\r\\n' >&3 && read -r line <&3 && [[ $line == HTTP/1.?' 200 '* ]]"]
ENTRYPOINT ["entrypoint"]
CMD ["serve"]
