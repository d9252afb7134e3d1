# The service and its demo. Other content: mount it and name its settings with DOWNLOADVIEW_CONFIG.
#   docker build -t downloadview .
#   docker run --rm --read-only --cap-drop ALL -p 8000:8000 downloadview

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
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DOWNLOADVIEW_CONFIG=/srv/app/downloadview.toml \
    DOWNLOADVIEW_SERVER__HOST=0.0.0.0
WORKDIR /srv
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/-/livez', timeout=2)"]
ENTRYPOINT ["downloadview"]
CMD ["serve"]
