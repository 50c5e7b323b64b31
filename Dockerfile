ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
WORKDIR /src
RUN python -m venv --without-pip /opt/loom
COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY bus bus
COPY agents agents
COPY phases phases
COPY runner runner
COPY loom loom
RUN pip --python /opt/loom/bin/python install --no-cache-dir --disable-pip-version-check '.[fast]'

FROM python:${PYTHON}-slim
# As PID 1, an init forwards signals from the first moment and reaps the processes that an agent leaves behind.
RUN apt-get update && apt-get install --yes --no-install-recommends tini && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
# The base image comes without byte code and containers cannot write any: every start would compile again.
RUN python -m compileall -qq -j 0 /usr/local/lib || true  # a file that does not compile costs only its own time
COPY --from=build /opt/loom /opt/loom
# The user has no home: libraries that keep files in one find /tmp.
ENV PATH=/opt/loom/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT ["tini", "-s", "--", "loom"]
CMD ["--help"]
